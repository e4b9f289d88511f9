"""DARE (arXiv 2311.03099) with task arithmetic: drops updates at random, then adds them up."""

from functools import partial

from fusechat.merge import dare

PARAMETERS, BASE, TARGETS = dare.PARAMETERS, True, None
measure = dare.measure
combine = partial(dare.combine, consensus=False)
