"""The words that prompts are made of: short and common, so that most tokenizers have one token for each."""

WORDS = tuple(
    """
    able about above across act add after again age ago air all also always among and animal answer any apple area arm art
    ask away back bad ball bank base bear beat bed before begin best better big bird black blood blue board boat body bone
    book both box boy bread break bring brown build burn busy call came can car card care case cat catch cause cell center
    chair chance change child city class clean clear climb clock close cloud coast cold color come cook cool copy corn
    cost count course cover cow cross cry cup cut dance dark day dead deal dear deep desk did die dog done door double down
    draw dream dress drink drive drop dry duck dust each ear early earth east easy eat edge egg eight end enemy energy
    """.split()
)
