"""The words that prompts are made of: short and common, so that most tokenizers have one token for each."""

WORDS = tuple(
    """
    able about above across act add after again age ago air all also always among and animal answer any apple area arm art
    ask away back bad ball bank base bear beat bed before begin best better big bird black blood blue board boat body bone
    book both box boy bread break bring brown build burn busy call came can car card care case cat catch cause cell center
    """.split()
)
