"""Samples that another directory of latents has already."""

from collections.abc import Sequence

from framework.curate.units import Unit, parts_below
from framework.data.merge import read_records
from framework.data.shards import LATENT_SCHEMA, LatentSample, ShardDirectory, open_shards


class Reuse:
    """Finds a unit's samples in other directories, by the keys that their parts have recorded."""

    def __init__(self, urls: Sequence[str], tokenizer_version: str) -> None:
        """Raises ValueError: no finished directory of latents of this tokenizer."""
        self._found: dict[tuple[str, str], tuple[ShardDirectory, int, str]] = {}
        for url in urls:
            directory = open_shards(url)
            if (directory.schema, directory.tokenizer_version) != (LATENT_SCHEMA, tokenizer_version):
                raise ValueError(
                    f"--reuse {url} holds {directory.schema} of the tokenizer {directory.tokenizer_version}; only "
                    f"latents of {tokenizer_version} can be used again"
                )
            self._add(directory)

    def find(self, unit: Unit, uid: str) -> tuple[LatentSample, bool] | None:
        """A unit's sample of a uid, and whether its texts are what this unit's would be; None where there is none."""
        if (unit.latents, uid) not in self._found:
            return None
        directory, index, said = self._found[unit.latents, uid]
        sample = directory.read(index)
        assert isinstance(sample, LatentSample) and sample.info.uid == uid, (directory.url, index)
        return sample, said == unit.said

    def _add(self, directory: ShardDirectory) -> None:
        """A part's samples follow each other in the index as in its record, unless one was taken out as a duplicate."""
        begins: dict[str, int] = {}
        counts: dict[str, int] = {}
        at = 0
        for file in directory.files:
            part = file.name.rpartition("/")[0]
            begins.setdefault(part, at)
            counts[part] = counts.get(part, 0) + file.num_samples
            at += file.num_samples
        parts = [part for part in parts_below(directory.store) if part in begins]
        for part, record in zip(parts, read_records(directory.store.read, parts), strict=True):
            if len(record["samples"]) != counts[part]:
                continue
            index = begins[part]
            for item in record["inputs"]:
                latents, _, said = item["fingerprint"].partition("-")
                for uid in item["uids"]:
                    self._found.setdefault((latents, uid), (directory, index, said))
                    index += 1
