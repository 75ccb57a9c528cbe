"""Options that hang on how many clients there are, which data that name their clients tell only once they are read."""

from fedtalos.app.config.schema import EditingConfig, EditingOptions, FederatedConfig
from fedtalos.errors import InputError
from fedtalos.training.federated.aggregation import TooFewError, check_enough
from fedtalos.training.federated.client_sampling import clients_per_round


def check_clients(config: FederatedConfig | EditingConfig) -> None:
    """Refuse, with an InputError, options that ask for more clients than there are, or for more of them."""
    clients = config.split.num_clients
    if isinstance(config, EditingConfig):
        _check_calibration(config.editing, clients)
        return
    options, asked = config.aggregation, config.personal.personalise_clients
    if asked is not None and asked > clients:
        raise InputError(f"--personalise_clients {asked}: there are only {clients} clients; ask for fewer")
    if options.aggregation != "mean":
        try:
            count = clients_per_round(clients, config.federation.client_fraction)
            check_enough(options.aggregation, count, options.byzantine)
        except TooFewError as error:
            raise InputError(f"--aggregation {error}; lower --byzantine, or raise --client_fraction") from error
    if options.attackers > clients:
        raise InputError(f"--attackers {options.attackers}: there are only {clients} clients; ask for fewer")
    if options.dp_noise is not None and options.dp_delta >= 1 / clients:
        raise InputError(f"--dp_delta {options.dp_delta:g}: with {clients} clients it is to be below {1 / clients:g}")


def _check_calibration(options: EditingOptions, clients: int) -> None:
    if options.calibration_clients is not None and options.calibration_clients > clients:
        raise InputError(
            f"--calibration_clients {options.calibration_clients}: there are only {clients} clients; ask for fewer"
        )
    if options.calibration_client is not None and options.calibration_client >= clients:
        raise InputError(
            f"--calibration_client {options.calibration_client}: the {clients} clients are 0 to {clients - 1}; "
            "choose one of these"
        )
