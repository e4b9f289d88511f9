"""DARE (arXiv 2311.03099) with the sign election of TIES: drops updates at random, then merges as TIES."""

from functools import partial

from fusechat.merge import dare

PARAMETERS, BASE, TARGETS = dare.PARAMETERS, True, None
measure = dare.measure
combine = partial(dare.combine, consensus=True)
