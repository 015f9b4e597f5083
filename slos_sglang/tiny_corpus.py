"""The text from which the embedded model's tokenizer learns its words: made on the spot, the same for a seed.

Changing a word here changes the tokenizer of every seed.
"""

from __future__ import annotations

import random

# Stems of the corpus: common words, and those of the programs this project ships.
_WORDS = """
able about above across act add after again age agent ago air all allow alone along always amount and animal answer any
appear apple are area arm around arrive art ask back ball bank base basic batch be bear beat beauty because become bed
before begin behind believe below best better between big bird black block blood blue board boat body bone book born
both bottom box boy branch bread break bridge bright bring broad brother brown build burn business busy but buy call
came can capital car card care carry case catch cause cell center century certain chair chance change chapter charge
chart check chief child choose circle city claim class clean clear climb clock close cloth cloud coast coat code cold
collect color column come common company compare complete condition connect consider contain continue control cook cool
copy corn corner correct cost count country course cover create cross crowd cry current cut dance danger dark data day
dead deadline deal dear death decide deep degree deliver depend describe desert design detail develop dictionary
differ dinner direct discuss distance divide doctor does dog dollar done door double down draw dream dress drink drive
drop dry during each ear early earth ease east eat edge effect egg eight either electric element else end enemy energy
engine enough enter equal even evening event ever every exact example except excite exercise expect experience explain
express eye face fact fair fall family famous far farm fast father favor fear feed feel few field fight figure fill
final find fine finger finish fire first fish fit five flat floor flow flower fly follow food foot force foreign forest
form forward found four fraction free fresh friend from front fruit full function game garden gas gather general gentle
get girl give glad glass go gold good govern grand grass great green ground group grow guess guide hair half hand happen
happy hard hat have head hear heart heat heavy help here high hill history hold hole home hope horse hot hour house how
huge human hundred hunt hurry ice idea imagine inch include index indicate industry information insect instant interest
invent iron island job join joy judge jump just keep key kill kind king knew know lady lake land language large last
late laugh law lay lead learn least leave left leg length less let letter level library lie life lift light like line
liquid list listen little live local locate log lone long look lost loud love low machine magnet main major make man
many map mark market mass master match material matter may mean measure meat meet melody member memory metal method
middle might mile milk million mind mine minute miss mix modern molecule moment money month moon more morning most
mother motion mount mountain mouth move much multiply music must name nation natural nature near necessary neck need
neighbor never new next night nine noise noon north nose note nothing notice noun now number numeral object observe
occur ocean of off offer office often oil old once one only open operate opposite orange order organ original other our
out over own oxygen page paint pair paper paragraph parent part particular party pass past path pattern pay people
perhaps period person phrase pick picture piece place plain plan plane planet plant play please plural point poor
population port pose position possible post pound power practice prefill prepare present press pretty print probable
problem process produce product program promise proper property protect prove provide pull push put quart query question
queue quick quiet quite race radio rail rain raise range rather reach read ready real reason receive record red region
remember repeat reply report represent request require rest result return rich ride right ring rise river road rock roll
room root rope rose round row rub rule run safe sail salt same sand save say scale schedule school science score sea
search season seat second section see seed seem segment select self sell send sense sentence separate serve server set
settle seven several shape share sharp she sheet shell shine ship shoe shop shore short should shoulder shout show side
sight sign silent silver similar simple since sing single sister sit six size skill skin sky sleep slip slow small smell
smile snow soft soil soldier solution solve some son song soon sound south space speak special speech speed spell spend
spoke spot spread spring square stage stand star start state station stay stead steam steel step stick still stone stop
store story straight strange stream street stretch string strong student study subject substance subtract success such
sudden suffix sugar suggest suit summer sun supply support sure surface surprise swim syllable symbol system table tail
take talk tall target teach team tell temperature ten term test than thank that the their them then there these they
thick thin thing think third this those thought thousand three through throw thus tie time tiny tire together token
tone tool tooth top total touch toward town track trade train travel tree triangle trip trouble truck true try tube turn
twenty two type under unit until use usual valley value vary verb very view village visit voice vowel wait walk wall
want war warm wash watch water wave way wear weather week weight well west what wheel when where which while white whole
why wide wife wild will win wind window wing winter wire wish with woman wonder wood word work world would write wrong
yard year yellow yes yet young
"""
_SUFFIXES = ("", "", "", "", "s", "ed", "ing", "er", "ly")
_SNIPPETS = (
    '{"name": "%s", "arguments": {"%s": %d, "%s": "%s"}}\n',
    '{"tool": "%s", "input": "%s", "count": %d, "note": "%s %s"}\n',
    "def %s(%s):\n    return %d + %s(%s)\n",
    "SELECT %s, %s FROM city WHERE population > %d AND %s = '%s';\n",
    "Question: %s of the %s (%d)?\nAnswer: %s. %s\n",
)


def words() -> list[str]:
    """The stems: common English words."""
    return _WORDS.split()


def corpus(seed: int) -> list[str]:
    """Lines of made-up English, tool calls, code and numbers; every stem occurs."""
    words = _WORDS.split()
    rng = random.Random(seed)
    lines = []
    for word in words * 6:
        sentence = [word, *rng.choices(words, k=7)]
        rng.shuffle(sentence)
        text = " ".join(stem + rng.choice(_SUFFIXES) for stem in sentence)
        lines.append(text.capitalize() + rng.choice((".\n", "?\n", ", ", ": ")))
        if len(lines) % 4 == 0:
            a, b, c, d = rng.choices(words, k=4)
            lines.append(rng.choice(_SNIPPETS) % (a, b, rng.randrange(3000), c, d))
    return lines
