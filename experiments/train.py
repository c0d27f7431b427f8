"""Does this recipe collapse? Train replicates side by side on real text and look.

The default trains two BitNets in one program on this interpreter's standard library: one with the
report's optimiser (weight decay coupled into Adam), one with the published recipe. It ends with a
page, report.html in the workdir. Expected: the first ends above the loss of the unigram predictor,
the second far below it.

    python -m experiments.train
    python -m experiments.train --preset report --set data.corpus=text:books/*.txt --seeds 0-4
"""

from bitnet_jax import run
from experiments import common


def body(request: common.Request) -> None:
    run.run(request.cfg, request.replicates, request.workdir, resume=request.resume)
    print(f"report: {request.workdir / 'report.html'}")


if __name__ == "__main__":
    common.main(__doc__, "train", "quick", body)
