"""Answer requests from many threads with one loaded file."""

import numpy as np

import rtresnet as rt

photographs = [np.zeros((48, 64, 3), np.uint8), np.zeros((600, 400, 3), np.uint8)]  # RGB

with rt.load("engines/resnet20-int8.onnx") as session:
    logits = session(session.prepare(photographs))  # float32 [2, classes]
    print([session.classes[index] for index in logits.argmax(axis=1)])

    with rt.Batcher(session, max_batch=32, max_wait_ms=2) as batcher:  # forms batches
        answers = [batcher.submit(image) for image in session.prepare(photographs)]
        print([answer.result().shape for answer in answers])
