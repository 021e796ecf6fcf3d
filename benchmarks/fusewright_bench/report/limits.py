"""What the machine of a run can do, as a table."""

from fusewright_bench.report.table import bytes_text, significant
from fusewright_bench.results import Results

HEADER = ("limit", "threads", "rate", "")


def lines(results: Results) -> list[list[str]]:
    """Cells under :data:`HEADER`: bandwidth of every memory level, then arithmetic, per thread count."""
    made = []
    for found in results.roofline.get("bandwidth", []):
        level = found.get("level", "memory")
        rates = f"copy {significant(found['copy_gbps'])} GB/s, read {significant(found['read_gbps'])} GB/s"
        made.append([level, str(found["threads"]), rates, f"{bytes_text(found['bytes'])} working set"])
    for found in results.roofline.get("peak", []):
        unit = "10^9 per second" if found["unit"] == "exp" else "GFLOP/s"
        rate = f"{significant(found['gflops'])} {unit}"
        made.append([f"{found['unit']} {found['dtype']}", str(found["threads"]), rate, found.get("probe", "")])
    return made
