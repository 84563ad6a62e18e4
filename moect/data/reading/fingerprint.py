"""What a corpus' tokens depend on, as one number."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from moect.data.reading.digests import digest
from moect.data.reading.files import EXTENSIONS, resolve_files
from moect.data.reading.hub import identity
from moect.data_config import DataConfig, SourceConfig

FORMAT_VERSION = 2  # of token stores


def source_fingerprint(
    source: SourceConfig, config: DataConfig, tokenizer, cache_folder: Path, online: bool = True
) -> str | None:
    """sha256 over all that decides about a corpus' tokens: contents and kinds of the files, or the dataset's commit;
    options, tokenizer, and the format of the store.

    None: a dataset's commit is not known, and `online` does not allow to ask.

    Raises:
        DataError: a file that cannot be found or read; as `identity` for a dataset.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # settings of earlier calls, which do not matter here
    backend.no_padding()
    filters = {name: dataclasses.asdict(conditions) for name, conditions in source.filter.items()}
    options = [FORMAT_VERSION, source.lang, source.text_field, source.id_field, source.limit, filters]
    parts = [json.dumps(options), json.dumps([tokenizer.bos_token_id, tokenizer.eos_token_id]), backend.to_str()]
    if source.dataset:
        made_of = identity(source, config.root, cache_folder, online)
        if made_of is None:
            return None
        parts += made_of
    for file in resolve_files(source.path, config.root) if source.path else ():
        kind = next(e for e in EXTENSIONS if file.name.endswith(e))
        parts += [kind, digest(file, cache_folder)]
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part.encode("utf-8")).digest())
    return whole.hexdigest()
