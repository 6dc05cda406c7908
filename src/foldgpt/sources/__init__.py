"""Where models come from: a hub id, a local folder, a GGUF file, or a demo model.

Whatever the origin, a source is first resolved to files on this machine, the files are checked before any
weight is read, and what is loaded is complete: a weight that is missing, left over or of another shape is an
error, because a block with random weights looks like any other block.
"""

from foldgpt.sources.configs import load_config
from foldgpt.sources.gguf_files import load_gguf
from foldgpt.sources.load import DTYPES, Source, device_of, load_source, load_tokenizer
from foldgpt.sources.locate import resolve
from foldgpt.sources.weights import companions_fingerprint, model_fingerprint, stored_dtype

__all__ = [
    "DTYPES",
    "Source",
    "companions_fingerprint",
    "device_of",
    "load_config",
    "load_gguf",
    "load_source",
    "load_tokenizer",
    "model_fingerprint",
    "resolve",
    "stored_dtype",
]
