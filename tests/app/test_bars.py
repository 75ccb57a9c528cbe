from fedtalos.app.run.bars import bar


def decode(unit="images"):
    with bar("decoding", 2, unit) as advance:
        advance(1)
        advance(1)


def test_a_bar_shows_on_a_terminal_and_leaves_nothing_elsewhere(monkeypatch, capsys):
    decode()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    monkeypatch.setenv("COLUMNS", "80")
    for unit in ("images", "bytes"):
        decode(unit)
        out, err = capsys.readouterr()
        assert out == ""
        assert "decoding" in err
