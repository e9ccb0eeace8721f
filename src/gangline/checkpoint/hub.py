"""What the Hugging Face Hub refuses, in one line each."""

from collections.abc import Iterator
from contextlib import contextmanager

from gangline.core.errors import CheckpointError


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one-line :class:`CheckpointError` with the way out."""
    from huggingface_hub import errors

    # The base error of the HTTP client, whichever client huggingface_hub was built on.
    client_errors = tuple(base for base in errors.HfHubHTTPError.__bases__ if issubclass(base, Exception))
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name}: access to it is restricted; accept its terms on its Hub page, then run: hf auth login"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise CheckpointError(
            f"{name}: neither a file or folder here nor a model on the Hub that you can see; check the name, "
            "or for a private model run: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{name}: the Hub has no such revision of it; check the branch, tag or commit"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{name}: not in the local cache, and the Hub cannot be reached; connect "
            "(or unset HF_HUB_OFFLINE), or name a local folder"
        ) from error
    except (errors.EntryNotFoundError, errors.NotASafetensorsRepoError) as error:
        raise CheckpointError(
            f"{name}: the repository lacks config.json, safetensors files or the file named; "
            "look at its files on the Hub"
        ) from error
    except errors.SafetensorsParsingError as error:
        raise CheckpointError(
            f"{name}: a safetensors header on the Hub is broken; tell its owner ({error})"
        ) from error
    except client_errors as error:
        raise CheckpointError(
            f"{name}: the Hub cannot be read ({str(error)[:120]!r}); check the network and try again"
        ) from error
