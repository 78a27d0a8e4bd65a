"""What one request may hold, each limit in the unit of what reads it. /openapi.json shows them too.

Beyond them a request is refused before any work: a query of two million words costs full-text search 32 GB. The body
as a whole is limited by REFRAG_MAX_BODY (bytes), prompt and answer by the recipe's `serving` (decoder positions).
Imports nothing: the API's process starts with it.
"""

# Characters of one text: a message, a part of one, a passage, a query, an argument of a tool call.
MOST_CHARACTERS = 262_144
# Characters of all messages and passages together: what the tokenizer reads for one answer.
MOST_CHARACTERS_IN_ALL = 1_048_576
MOST_TITLE_CHARACTERS = 4096
# Names, ids and other short things.
MOST_NAME_CHARACTERS = 1024
MOST_STOP_CHARACTERS = 1024
MOST_STOPS = 4
MOST_MESSAGES = 1024
# Of a message; tool calls likewise.
MOST_PARTS = 256
MOST_PASSAGES = 256
# Of a request for embeddings.
MOST_TEXTS = 2048
# Of a request that adds some.
MOST_DOCUMENTS = 256
MOST_TOKENS = 8192
# Of an answer's JSON schema.
MOST_SCHEMA_CHARACTERS = 65_536
MOST_CHOICES = 16
# Different words that full-text search looks for at once. English text of 5,000 words has about 1,500.
MOST_QUERY_WORDS = 2048
