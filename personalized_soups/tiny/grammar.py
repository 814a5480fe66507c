"""A small grammar of English, which decides whether a sentence parses.

Every word has one or more parts of speech, and `FOLLOWERS` lists the parts that may follow each part. A clause is the
text between two commas. A clause parses if a sequence of parts exists, one part for each word, in which every part may
follow the part before it. A sentence parses if all its clauses parse. The grammar accepts ordinary sentences about
household things by any writer. It rejects unknown words, shuffled words, and the broken sentences of an over-steered
language model ("put the with a towel").

Parts of speech:
d determiner, n noun that may stand alone, k countable noun (it needs a determiner), j adjective, a adjective between a
determiner and its noun, o adjective that says what a thing becomes ("rub it dry"), v verb (base form), z finite verb,
p preposition, x particle, r adverb, c conjunction, w question word, s pronoun, g verb form in -ing or -ed,
i interjection, t the "to" of an infinitive. `^` is the start and `$` the end of a clause.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise

from personalized_soups.tiny import language

WORDS: dict[str, str] = {
    "d": "a all an another any both each enough every few five four her his its many more most my no one other our "
    "some that the their these this those three two your",
    "n": "abrasion abrasive absorption acceleration acid adhesion adhesive afternoon air airflow alcohol alignment "
    "angle answer apertures apparatus applicator area assembly assistant attribution back bag base bit bits "
    "blood bottom bow box boy bristles brush buddy bugs cap capacity care carnauba cellulose centre chance "
    "change chemicals child clamp cloth coat coating cohesion collision colour compartment components "
    "composition compound concentration condition configuration consistency contact container contaminants "
    "contamination content coordinates corner corridor corrosion cotton coverage crack crosslinking "
    "cyanoacrylate dad damage dark day days defect degradation degrees density deposit deposits designation "
    "destination detachment detergent deterioration diagnosis dirt drops dust edge edges emulsion enclosure "
    "end ends energy enthusiasm environment epoxy evaporation expansion exposure exterior extremities fabric "
    "face film fingers fingertips floor flow fluid fool forces fracture friction friend friends fun gaps girl "
    "glass gloss gloves glue grain grease ground half hand hands heart heat help hole home hour hours house "
    "hugs humidity hygrometer idea identification idiot impact inside inspection inspections instrument "
    "integrity interval intervals isopropanol isopropyl job joint joy kid kitchen label laminate layer layers "
    "legs lid ligature lines lipids liquid load lots love luck manoeuvre mask material membrane mess metal "
    "microfibre mind minerals minute minutes moisture moment month morning mum name night nonsense nylon "
    "obstructions oil opacity operator orbits order orientation oxidation oxygen paint pal paper part "
    "particles particulate particulates parts people perimeter person phase pieces pigment place plastic "
    "pleasure polyethylene polymer polymerisation position power pressure probability problem procedure "
    "process project question radiation rag reaction recipient reflectance region residue rings room rub rust "
    "sand sandpaper scale scratches sensor sheet shine shoes side sides silicone sink size smile soap soda "
    "solution solvent sort source spaces sponge spot spots stains step steps strain streaks strength stress "
    "string substance substrate sun sunlight surface surfaces surfactant tape temperature termini test "
    "textile thing things thumb time tip top towel trajectory transit tub vapour velocity viscosity volume "
    "wall water wax way weight wind window wipe wood work years",
    "j": "abrasive absorbent accidental acrylic additional adhesive adjacent airborne alkaline alone amazing ambient "
    "angular annoying aqueous awesome bad beautiful best better boring brief bright bristly capillary careful "
    "cellulose chromatic clean clear close cold complete concentric constant convective convenient cool corrosive "
    "curing dark dear decorative designated different dilute dirty dry drying dull dumb dusty easy empty epoxy "
    "excess fine fine-grit finished first flat flexible free fresh full fun gentle geometric glad good "
    "gravitational greasy great happy hard helpful hermetic hot hydrophilic incipient incremental inertial initial "
    "inner interfacial interior isopropyl kind last lateral lazy lint-free long loose lovely low lower lucky lumbar "
    "luminous magic mechanical microcrystalline microfibre mild mineral moderate natural neat neutral next nice "
    "nominal non-abrasive nylon obvious open organic other own particulate perfect periodic persistent "
    "photochemical plain polyethylene possible protective proud pure quick quiet ready real recommended regular "
    "residual right rotary rough safe same secondary shiny shut sick silly simple slick slow small smooth soapy "
    "soft solar specified specular stale sticky strong structural stupid sufficient super superficial superfluous "
    "supplementary sweet synthetic technical tensile terrible thermal thick thin tight tiny tired transit "
    "ultraviolet unambiguous uniform useful useless visual volumetric warm wet wonderful worn wrong young",
    "v": "abrade accelerate add affix agitate air allocate allow apply ask attach attain attenuate avert avoid be "
    "believe blame blast blot blow bother break bring brush buff burnish buy call care carry centre characterise "
    "check choose clamp clean clear coat complete compress conduct consolidate coordinate cover crack cure cut "
    "dampen decontaminate degrease delimit deposit desiccate designate detect dip dislodge dissolve distribute do "
    "drop dry dust elevate eliminate emulsify encapsulate encase encircle enclose enjoy ensure envelop equalise "
    "evacuate evaluate excite exclude expel expose extract facilitate fade fail feel figure fill find finish fit "
    "flip flush fold forget fret get give glue go grab guarantee hang have help hoist hold homogenise hope hurry "
    "hurt immerse immobilise impede inhibit inject inscribe inspect invert irrigate isolate join keep know lay "
    "leave let lie lift like limit line listen live localise look loosen love maintain make manage mask maximise "
    "mean measure mess minimise mix monitor need observe open optimise pat peel permit pick position pour preclude "
    "prepare press prevent promote protect pull push put quantify reach read recruit redistribute reduce regulate "
    "reinforce release relocate remember remove repeat rest restore restrict retard rinse roll rotate rub rush sand "
    "saturate save say scratch scrub seal secure see send set shake shine show sit slide slip smile smooth soak "
    "solidify sort spend spray spread squeeze stabilise stand start stay stick stop stretch subject superimpose "
    "survey sweep take talk tap tape tell test thank think throw tie tip top touch treat trip trust try turn "
    "understand use validate verify volatilise wait walk want warm wash waste watch wear wet wipe work worry write",
    "z": "allows am are be been can can't cannot cares comes could did dissolves do does doesn't don't ensures feels "
    "gets goes got had happens has have here's hurts i'm is isn't it's keeps knows let's looks loses makes may "
    "means might must needs prevents protects reduces removes shall shines should stays sticks takes that's there's "
    "thinks wants was we'll were will won't works would you'll you're",
    "p": "about after against along around as at before behind below beside between by during for from in inside into "
    "like near of off on onto out over per since through till to toward under until up upon via with within without",
    "x": "about aside away back by down for in like off on out over through under up",
    "r": "again all almost alone already also always away back beforehand better carefully clearly dry even ever far "
    "fast finally firmly first flat forever gently gladly good hard here honestly instead just kindly last later "
    "less maybe more much never next not now obviously off often once only please pretty probably quickly quite "
    "rather really simply slow slowly so softly soon still then there thoroughly tight today together tomorrow "
    "tonight too twice very well yet",
    "c": "and because but how if once or so than that then till unless until what when where whether while who",
    "w": "how what when where which who whose why",
    "s": "all anything both each everything he her him i it me mine more most nobody none nothing one she some "
    "somebody something that them there they this us we what who you yours yourself",
    "g": "asked asking boiling broken called cleaning coated coming cooling crying curing deionised designated doing "
    "done dried drying extending faded filtered finished folded getting giving going gone helping holding left "
    "looking made making moving needed painting polishing protecting purified putting recommended removing retained "
    "rubbing saying seen shining specified trying used using wasting working wrapping",
    "i": "ah bah cheers goodbye great hello hey hi hooray no oh ok okay please sorry sure thanks ugh well wow yay yes",
    "t": "to",
    "o": "clean cold cool dark dry flat hot open shut smooth still tight warm wet",
}
# Singular countable nouns, in addition to `language.NOUNS`. They need a determiner: "put a bag", not "put bag".
_COUNTABLE = (
    "angle answer area assistant bag bow box boy brush bucket clamp cloth coat compartment corner crack degree "
    "edge end face film finger floor fool fracture girl head hole hygrometer idea idiot instrument kid label "
    "laminate layer lid ligature mask membrane moment name operator pal person polymer problem procedure process "
    "project rag region sensor sheet side solution sponge spoon spot stain string substrate surface tape test "
    "textile thing thumb tip towel way window"
)
FOLLOWERS: dict[str, str] = {
    "^": "dnjvzprcwsgix",
    "d": "nkagd",
    "a": "nkag",
    "k": "nkvzpxrct$go",
    "n": "nkvzpxrct$go",
    "j": "jnpxrct$s",
    "o": "pxrct$",
    "v": "dnjpxrcswgvt$io",
    "z": "dnjpxrswgvzt$",
    "p": "dnjswgr",
    "x": "pxrct$dg",
    "r": "dnjvzpxrcswgt$i",
    "c": "dnjvzpsrwgtix",
    "w": "dnjvzsrgt$",
    "s": "vzpxrctdnjgws$oa",
    "g": "dnkjpxrcsgt$w",
    "i": "idnjvswrz$cp",
    "t": "vzr",
}
_WORD = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*")


@cache
def parts(word: str) -> frozenset[str]:
    """Return the parts of speech of a lower-case word, or an empty set for an unknown word."""
    if word.isdigit():
        return frozenset("jd")
    return _lexicon().get(word, frozenset())


@cache
def _lexicon() -> dict[str, frozenset[str]]:
    lexicon: dict[str, set[str]] = {}
    for part, words in WORDS.items():
        for word in words.split():
            lexicon.setdefault(word, set()).add(part)
    for noun in language.NOUNS:
        for form in (noun, noun + "s"):
            lexicon.setdefault(form, set()).add("n")
    for adjective in language.ADJECTIVES:
        lexicon.setdefault(adjective, set()).add("j")
    for action in language.ACTIONS:
        lexicon.setdefault(action, set()).add("v")
    for noun in (*language.NOUNS, *_COUNTABLE.split()):
        lexicon.setdefault(noun, set()).discard("n")
        lexicon[noun].add("k")
    for kinds in lexicon.values():
        if "j" in kinds:
            kinds.add("a")
    return {word: frozenset(kinds) for word, kinds in lexicon.items()}


def words(text: str) -> list[str]:
    """Return the lower-case words of a text, without punctuation."""
    return _WORD.findall(text.lower())


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, each with its closing mark."""
    return re.findall(r"[^.!?]+[.!?]*", text.strip())


def parses(sentence: str) -> bool:
    """Return whether all clauses of a sentence parse. It must also begin with a capital or digit and end with a mark.

    A sentence that repeats a word at once ("the the") does not parse.
    """
    sentence = sentence.strip()
    if not re.fullmatch(r"[A-Z0-9][^.!?]*[.!?]", sentence) or re.search(r"[^A-Za-z0-9 ,.!?'-]|,\s*[.!?,]", sentence):
        return False
    clauses = [words(clause) for clause in sentence.split(",")]
    if any(not clause for clause in clauses) or _stutters(words(sentence)):
        return False
    return all(_has_path(clause) for clause in clauses)


def _stutters(found: list[str]) -> bool:
    return any(first == second for first, second in pairwise(found))


def _has_path(clause: list[str]) -> bool:
    reachable = {"^"}
    for word in clause:
        reachable = {part for part in parts(word) if any(part in FOLLOWERS[before] for before in reachable)}
        if not reachable:
            return False
    return any("$" in FOLLOWERS[before] for before in reachable)
