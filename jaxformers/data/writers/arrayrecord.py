"""ArrayRecord files of token ids: a record a document, its ids little-endian, in the dtype that the manifest names."""

from pathlib import Path

from jaxformers.data.cache import TokenCache

_OPTIONS = "group_size:1"  # a record is a chunk of its own, so that reading one decompresses no other


def write_arrayrecord(path: Path, cache: TokenCache, first: int, last: int, *, dtype: str) -> None:
    """Documents [first, last) of a cache.

    Raises:
        ValueError: the package array_record is not installed.
        OSError: what the file system says.
    """
    try:
        from array_record.python.array_record_module import ArrayRecordWriter  # no wheels for every platform
    except ImportError:
        raise ValueError("writing ArrayRecord needs array_record: pip install 'jaxformers[data]'") from None
    path.touch()  # what hinders it is an OSError with a reason, which the writer's own errors are not
    writer = ArrayRecordWriter(str(path), _OPTIONS)
    try:
        for start, length in zip(cache.starts[first:last].tolist(), cache.lengths[first:last].tolist(), strict=True):
            writer.write(cache.tokens[start : start + length].astype(dtype, copy=False).tobytes())
        writer.close()
    except RuntimeError as error:
        raise OSError(f"{path.name}: {' '.join(str(error).split())}") from error
