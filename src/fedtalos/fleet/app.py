"""The app that Flower runs on a node: it hands letters to the desk. The server's is lead.py."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtalos.fleet.desk import ask_desk
from fedtalos.fleet.flower import letter_of, record_of
from fedtalos.fleet.letter import Letter

client_app = ClientApp()


@client_app.query("letter")
def answer_letter(message: Message, _context: Context) -> Message:
    """Have the desk answer a letter."""
    answer = Letter.read(ask_desk(letter_of(message.content).written()))
    return Message(record_of(answer), reply_to=message)
