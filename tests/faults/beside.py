"""The same recipe run twice at once in one work directory, and one of the two killed."""

import shutil

from faults.children import later
from faults.place import LAUNCHES, LOST, Fault, Place
from fusechat.recipe.schema import STAGES


def two_at_once(place: Place, launch: str, number: int, *, kill: bool) -> None:
    """The one that is not killed goes through, and gives the weights of an undisturbed run."""
    chance = place.chance("next to", launch, number)
    workdir = place.scratch / f"next to-{LAUNCHES[launch]}-{number}"
    both = [place.begin(workdir, launch) for _ in range(2)]
    whole = sum(place.references[launch].seconds.values())
    fault = Fault("two at once", launch, "", "both to the end")
    if kill:
        victim, wait = chance.randrange(2), later(chance, 0.9 * whole)
        for one in both:
            one.wait(wait)
        both[victim].kill()
        both = [both[1 - victim], both[victim]]
    for one in both:
        one.wait()
    if kill and both[1].killed:
        what = f"the {('first', 'second')[victim]} killed"
        fault = Fault("two at once, one killed", launch, both[1].stage or STAGES[0], what)
    if not both[0].done or not (both[1].done or (kill and both[1].killed)):
        place.note(fault, LOST, f"{both[0].end()}; {both[1].end()}")
        return
    models, others = place.differing(workdir, launch)  # before any other run
    if models:
        place.note(fault, LOST, f"differs: {', '.join(models)}", others)
        return
    place.judge(fault, workdir, launch)
    shutil.rmtree(workdir)
