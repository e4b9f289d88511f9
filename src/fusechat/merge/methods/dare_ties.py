"""DARE with the sign election of TIES (arXiv 2311.03099): updates dropped at random, then as TIES."""

from functools import partial

from fusechat.merge import dare

PARAMETERS, BASE, TARGETS = dare.PARAMETERS, True, None
measure = dare.measure
combine = partial(dare.combine, consensus=True)
