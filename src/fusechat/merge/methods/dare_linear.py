"""DARE (arXiv 2311.03099) with task arithmetic: updates dropped at random, then added up."""

from functools import partial

from fusechat.merge import dare

PARAMETERS, BASE, TARGETS = dare.PARAMETERS, True, None
measure = dare.measure
combine = partial(dare.combine, consensus=False)
