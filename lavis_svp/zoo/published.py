"""Models, tokenizers and configurations in Hugging Face's form: read by transformers, and nothing in them is run.

``trust_remote_code=False`` alone does not keep transformers (4.57) from running what lies in a folder: it asks nobody
before it imports a local ``custom_generate/generate.py``. It also goes where ``adapter_config.json`` points to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lavis_svp.common.files import BadFileError, one_line, read_json, shown

T = TypeVar("T")
CONFIG, ADAPTER, GENERATION_CODE = "config.json", "adapter_config.json", "custom_generate/generate.py"
MAX_LAYERS = 10_000  # of a model: a damaged number would build layers until the memory is full
MEND = "Fetch it again, or name another model."


def read_published(read: Callable[..., T], source: str | os.PathLike[str], **settings: Any) -> T:
    """Read a configuration or a tokenizer.

    Args:
        read: ``from_pretrained`` of a transformers class.
        source: a local folder or a hub id.
        settings: further arguments of ``read``.

    Raises:
        BadFileError: a file is damaged or of a kind that ``read`` does not know, or it needs code of its own.
        OSError: there is no such model, or it cannot be fetched.
    """
    with _errors_of(source):
        _check_files(source, **settings)
        return read(source, **settings, trust_remote_code=False)


def load_published(model: Any, source: str | os.PathLike[str], **settings: Any) -> Any:
    """Load a model whose every tensor is in its files.

    Args:
        model: a transformers class, such as ``AutoModelForCausalLM``.
        source: a local folder or a hub id.
        settings: further arguments of its ``from_pretrained``.

    Returns:
        The model, in evaluation mode.

    Raises:
        BadFileError: a file is damaged or of another kind, lacks tensors of the model, or the model needs code of its
            own or another model's files.
        OSError: there is no such model, or it cannot be fetched.
        ImportError: the model or a setting needs a package that is not installed.
    """
    with _errors_of(source):
        _check_files(source)
        _refuse_orders(source)
        loaded, info = model.from_pretrained(source, output_loading_info=True, **settings, trust_remote_code=False)
        missing = sorted(info["missing_keys"])
        if missing:  # transformers gives them random values, with a warning
            listed = one_line(", ".join(missing))
            raise BadFileError(f"{source} lacks {len(missing)} tensors of {type(loaded).__name__}: {listed}. {MEND}")
    return loaded


def _check_files(source: str | os.PathLike[str], **settings: Any) -> None:
    """Refuse what would keep a reader busy for ever (FIFOs, devices, layers without end), and code to fetch."""
    if os.path.isdir(source):
        odd = [file for file in Path(source).iterdir() if file.exists() and not file.is_file() and not file.is_dir()]
        if odd:
            raise BadFileError(f"{odd[0]} is a FIFO, a socket or a device, no part of a model. {MEND}")
    path = _file_of(source, CONFIG, local_files_only=settings.get("local_files_only", False))
    config = {} if path is None else read_json(path, MEND)
    if not isinstance(config, dict):
        raise BadFileError(f"{path} holds no mapping. {MEND}")
    for section in (config, *(part for part in config.values() if isinstance(part, Mapping))):
        for key, value in section.items():
            if key.endswith(("layers", "depth", "n_layer")) and isinstance(value, int) and value > MAX_LAYERS:
                raise BadFileError(f"{path}: {key} is {shown(value)}, the limit is {MAX_LAYERS:,}. {MEND}")
            if "attn_implementation" in key and "/" in str(value):  # the form of a kernel's id
                raise BadFileError(f"{path} names code to fetch, {key}: {one_line(str(value))}. Delete that entry.")


def _refuse_orders(source: str | os.PathLike[str]) -> None:
    """Refuse what transformers would obey when it loads a model: code in the folder, or another model's place."""
    if _file_of(source, ADAPTER):
        raise BadFileError(
            f"{source} holds an adapter ({ADAPTER}), which names another model to load. Merge it into that model, and "
            "name the merged one."
        )
    if os.path.isdir(source) and _file_of(source, GENERATION_CODE):  # of a hub id transformers itself refuses it
        raise BadFileError(
            f"{source} brings code ({GENERATION_CODE}), which is never run here. Delete it if you need only the "
            "weights, or name another model."
        )


def _file_of(source: str | os.PathLike[str], name: str, **settings: Any) -> str | None:
    from transformers.utils import cached_file

    try:
        return cached_file(source, name, **settings)
    except OSError:  # there is none
        return None


@contextmanager
def _errors_of(source: str | os.PathLike[str]) -> Iterator[None]:
    """Make one line of the errors of transformers, tokenizers and safetensors, which damaged files drive anywhere."""
    try:
        yield
    except (BadFileError, FileNotFoundError, PermissionError, ImportError, MemoryError):
        raise
    except Exception as error:
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            raise
        if "trust_remote_code" in str(error):  # what transformers would have one set
            raise BadFileError(
                f"{source} needs code of its own, which is never run here. Name a model whose kind transformers has."
            ) from error
        if isinstance(error, OSError) and not os.path.isdir(source):
            raise OSError(f"{source} cannot be fetched ({one_line(error)}). Check the name and the network.") from error
        raise BadFileError(f"{source} cannot be loaded ({one_line(error)}). {MEND}") from error
