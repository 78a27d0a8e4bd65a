"""Quality: Great Expectations suites over summaries of each artifact.

`suites` says what is expected (data only), `summaries` turns an artifact's files into rows, `checks`
holds one against the other, `results` keeps what was found.
"""
