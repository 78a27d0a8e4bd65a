"""All of the code location on one screen. `dagster dev` (or `make ui`) loads `defs`.

corpus -> reconstruction -> cpt -> finetuned -> {chunks, policy} -> evaluation -> package -> released
"""

import dagster as dg

from assets.chunks import chunks
from assets.corpus import corpus
from assets.cpt import cpt
from assets.evaluation import evaluation
from assets.finetuned import finetuned
from assets.jobs import refrag_pipeline, retraining, retraining_schedule, source_documents
from assets.package import package
from assets.pipes import StageProcess
from assets.policy import policy
from assets.reconstruction import reconstruction
from assets.released import released
from assets.webhook import failure_webhook


def definitions(stage_process: StageProcess) -> dg.Definitions:
    """The code location, with the given way to run a stage."""
    return dg.Definitions(
        assets=[corpus, reconstruction, cpt, finetuned, chunks, policy, evaluation, package, released],
        jobs=[refrag_pipeline, retraining],
        schedules=[retraining_schedule],
        sensors=[source_documents, failure_webhook],
        resources={"stage_process": stage_process},
        # Stages run in processes of their own; two steps at once keep a device and a core busy.
        executor=dg.multiprocess_executor.configured({"max_concurrent": 2}),
    )


defs = definitions(StageProcess())
