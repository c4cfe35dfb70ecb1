"""A slow evaluation in a process of its own, for the tests that kill it: a part for each batch.

It prints "scoring" when everything is imported.

python -m tests.faults.killable_evaluation INPUT RUN SECONDS_PER_BATCH
"""

import sys

from perplexit.evaluation import evaluate
from perplexit.runs import store
from tests.toy_sessions import BigramSession

if __name__ == "__main__":
    input_path, run_folder, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    store.SECONDS_BETWEEN_PARTS = 0.0
    session = BigramSession(seconds_per_batch=seconds)
    print("scoring", flush=True)
    evaluate(session, input_path, run=run_folder, batch_size=2, top_k=2)
