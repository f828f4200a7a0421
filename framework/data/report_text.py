"""The report as a person reads it: plain text, aligned."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from framework.data.report import BucketReport, Report, StreamReport

COLUMNS = (
    ("bucket", "frames x height x width @ frames a second"),
    ("samples", "that fit it, in all streams; one may fit several buckets"),
    ("hours", "their length"),
    ("tokens", "of one sample"),
    ("batch", "samples of one draw: a step is one draw of one bucket, or `data.rounds` of them"),
    ("degrees", "ring x ulysses: how many ranks share a sample"),
    ("micro", "micro-batches x samples of each, on each group of ranks that share a sample"),
    ("mix", "its part of the samples that are trained on, %"),
    ("FLOPs", "its part of the work, %"),
    ("grad", "its part of the gradient, %"),
    ("crop", "picture cut off to the bucket's aspect ratio, %"),
    ("cut", "video that lies outside the one clip that a draw takes of it, %"),
    ("pad", "tokens added so that they split evenly, %"),
    ("empty", "slots without a sample, as the batch doesn't deal out evenly, %"),
)


def report_lines(report: Report) -> list[str]:
    """The whole report."""
    samples, length = sum(s.samples for s in report.streams), sum(s.hours for s in report.streams)
    degrees = " ".join(f"{axis}={degree}" for axis, degree in report.mesh.items())
    ranks = "1 rank" if report.ranks == 1 else f"{report.ranks:,} ranks"
    draws = "" if report.rounds == 1 else f" in {report.rounds} draws"
    return [
        f"{samples:,} samples, {hours(length)} hours; mesh {degrees} = {ranks}; {report.steps:,} steps of "
        f"{report.global_batch:,} samples on average{draws}",
        "",
        *table([[name for name, _ in COLUMNS], *(bucket_row(bucket) for bucket in report.buckets)]),
        "",
        *(f"  {name:8} {meaning}" for name, meaning in COLUMNS),
        "",
        *(text for stream in report.streams for text in stream_lines(stream, report.steps)),
        "",
        *run_lines(report),
        *(f"warning: {text}" for text in report.warnings),
    ]


def run_lines(report: Report) -> list[str]:
    """What the run does as a whole."""
    spread, factors = report.samples_a_step, report.factors
    steps = f"a step has {spread.mean:,.1f} samples"
    if spread.ratio > 1:
        steps += f" on average, {spread.p5:,.0f} to {spread.p95:,.0f} in 90% of the steps"
    return [
        f"{steps}; the gradient weighs them {report.loss_weight} (loss.weight)",
        f"samples read, all ranks together: {size(report.step_bytes)} a step, {size(report.run_bytes)} in "
        f"{report.steps:,} steps",
        f"expected goodput {report.goodput:.1%}: of the ranks' time, what is work on samples; lost are "
        f"{1 - factors.slots:.2%} to empty slots, {1 - factors.padding:.2%} to padding, {1 - factors.speed:.2%} to "
        f"waiting for the slowest rank",
        f"  ({report.simulated_steps:,} steps simulated; assumed: ranks up to {report.speed:.0%} slower or faster than "
        f"their mean, data always ready; what the ranks send isn't counted)",
    ]


def bucket_row(bucket: BucketReport) -> list[str]:
    shares = (bucket.share_samples, bucket.share_flops, bucket.share_gradient)
    cuts = (bucket.cropped_pixels, bucket.cropped_frames, bucket.padded_tokens, bucket.empty_slots)
    # 3, 3, 2: micro-batches of a draw differ by one sample at most.
    micro = " + ".join(f"{len(list(same))} x {each}" for each, same in groupby(bucket.micro_batches))
    return [
        bucket.name,
        f"{bucket.samples:,}",
        hours(bucket.hours),
        f"{bucket.tokens:,}",
        f"{bucket.batch:,}",
        f"{bucket.ring} x {bucket.ulysses}",
        micro,
        *(f"{100 * share:.1f}" for share in (*shares, *cuts)),
    ]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def stream_lines(stream: StreamReport, steps: int) -> list[str]:
    """What one stream holds, loses and repeats."""
    gone = sum(stream.dropped.values())
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in Counter(stream.dropped).most_common())
    lines = [
        f"stream {stream.path}: {stream.samples:,} {stream.holds}, {hours(stream.hours)} hours, "
        f"{size(stream.num_bytes)}",
        f"  dropped, as they fit no bucket: {gone:,} ({gone / stream.samples:.1%}): {reasons} (each counted once, for "
        f"the bucket that it misses least)"
        if gone
        else "  every sample fits a bucket",
    ]
    if stream.epochs:
        least, most = (pick(stream.epochs, key=lambda name: stream.epochs[name]) for pick in (min, max))
        seen = f"{stream.epochs[most]:,.2f} times by {most}"
        if least != most:
            seen = f"from {stream.epochs[least]:,.2f} times by {least} to {seen}"
        lines.append(f"  what fits a bucket is seen by step {steps:,}: {seen}")
    if stream.cache_bytes:
        lines.append(f"  cache on each node for one window of every bucket: {size(stream.cache_bytes)}")
    return lines


def hours(length: float) -> str:
    """A tenth, or two digits of less than an hour."""
    return f"{length:,.1f}" if length >= 1 or not length else f"{length:.2g}"


def size(num_bytes: float) -> str:
    """In units of 1000."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} PB"
