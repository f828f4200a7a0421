"""What preparing and encoding print."""

from framework.curate.encode import EncodeReport
from framework.curate.prepare import PrepareReport


def prepare_lines(report: PrepareReport) -> list[str]:
    """Kept, skipped with reasons by name, and where the same stands as JSON."""
    lines = [f"{report.out}: {report.num_samples} videos, {report.num_frames} frames"]
    lines += [f"skipped {skip.file}: {skip.reason}, {skip.detail}" for skip in report.skipped]
    lines += [f"kept {name}: its file is gone, its sample stays" for name in report.kept]
    counts = ", ".join(f"{count} {reason}" for reason, count in report.num_skipped.items())
    return [*lines, f"skipped in all: {counts or 'nothing'} (also in {report.out}/report.json)"]


def encode_lines(report: EncodeReport) -> list[str]:
    """Samples a bucket, videos that fit none, and the frames at the ends that no segment covers."""
    lines = [f"{report.out}: {count} clips of {bucket}" for bucket, count in report.num_samples.items()]
    total = sum(report.num_samples.values())
    lines += [f"{total - report.num_reused} encoded, {report.num_reused} copied from other directories"]
    lines += [f"skipped {misfit.uid}: {misfit.reason}, {misfit.detail}" for misfit in report.misfits]
    uncovered = sum(tail.frames for tail in report.tails)
    return [
        *lines,
        f"{uncovered} frames at the ends of {len(report.tails)} videos not covered ({report.out}/report.json)",
    ]
