"""A stage in a process that notes which files of the package run for it."""

import json
import sys

from refrag_platform.project import Project
from tests.planted import MODEL, run

# Module bodies count as functions do; what plumbing calls is plumbing's.
TRACE = """
import json, sys, threading
from pathlib import Path
from refrag_platform import runner
from refrag_platform.imports import PLUMBING
from refrag_platform.project import Project

root, (stage, model) = Path.cwd(), sys.argv[1:]
stage_function, seen = runner.stage_function, set()

def file_of(frame):
    return frame.f_code.co_filename.removeprefix(f"{root}/")

def notice(frame, event, argument):
    file = file_of(frame)
    if file in seen or not file.startswith("refrag_platform/"):
        return
    while frame is not None and frame.f_code is not traced.__code__:
        if any(Path(file_of(frame)).is_relative_to(path) for path in PLUMBING):
            return
        frame = frame.f_back
    seen.add(file)

def traced(context):
    before = sys.gettrace()
    threading.settrace(notice)
    sys.settrace(notice)
    try:
        return stage_function(runner.STAGES[stage])(context)
    finally:
        sys.settrace(before)
        threading.settrace(before)

runner.stage_function = lambda _: traced
runner.run_stage(Project(root), stage, model)
print(json.dumps(sorted(seen)))
"""


def run_traced(project: Project, stage: str) -> list[str]:
    """Make the artifact of a stage; the files, relative to the checkout, that ran for it."""
    return json.loads(run(project.root, sys.executable, "-c", TRACE, stage, MODEL).splitlines()[-1])
