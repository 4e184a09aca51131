"""Every target, by name."""

from fuzz import merging, serving
from fuzz.harness import Target

TARGETS: dict[str, Target] = {t.name: t for t in (*merging.TARGETS, *serving.TARGETS)}
