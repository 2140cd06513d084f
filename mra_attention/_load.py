"""Loads the compiled operators. Importing never compiles, and fails only where torch is missing."""

try:
    import torch
except ImportError as error:
    raise ImportError(
        "mra_attention needs PyTorch, which is not installed here: install torch, then reinstall "
        "mra_attention with 'pip install --no-build-isolation .'."
    ) from error


def _load():
    """The compiled module and None, or None and the sentence that says why there is none."""
    try:
        from . import _C
    except ModuleNotFoundError:
        return None, (
            "the operators of mra_attention are not built: run "
            "'pip install --no-build-isolation .' in its source folder."
        )
    except (ImportError, RuntimeError) as error:  # another torch, or registered twice
        reason = str(error).strip().splitlines()[0]
        return None, (
            f"the operators of mra_attention could not be loaded with torch {torch.__version__} "
            f"({reason}): rebuild them with 'pip install --no-build-isolation .'."
        )
    return _C, None


#: ``extension`` is the module with build information, ``problem`` why it is None.
extension, problem = _load()


def require():
    """Raises NotImplementedError with ``problem`` unless the operators are there."""
    if extension is None:
        raise NotImplementedError(problem)
