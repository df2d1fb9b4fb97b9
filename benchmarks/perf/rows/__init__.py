"""One function a row (or a few that belong together) of the report."""

from __future__ import annotations

from benchmarks.perf.record import RowMaker
from benchmarks.perf.rows import cuda, products, refreshes, scale, solvers, steps

ROWS: dict[str, RowMaker] = {
    "hessian_product": products.hessian_product,
    "hessian_product_cnn": products.hessian_product_cnn,
    "ggn_product": products.ggn_product,
    "ggn_forms": products.ggn_forms,
    "cold_top_ten": solvers.cold_top_ten,
    "class_start": refreshes.class_start,
    "warm_refreshes": refreshes.warm_refreshes,
    "warm_without_gap": refreshes.warm_without_gap,
    "averaged": refreshes.averaged,
    "projection": steps.projection,
    "auto_run": steps.auto_run,
    "memory": steps.memory,
    "host_reads": steps.host_reads,
    "scale": scale.scale,
    "block": cuda.block,
    "gpt2": cuda.gpt2,
}
