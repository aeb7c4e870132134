"""Tables and figures of the documents, written from the committed result files: `python -m benchmarks.report`."""
