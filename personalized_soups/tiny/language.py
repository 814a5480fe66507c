"""The vocabulary of the tiny corpus: household how-to answers, with several wordings for each step.

This module contains only data. An answer varies along three dimensions that are drawn independently:

- expertise: every step and every reason has a plain and an expert wording;
- informativeness: one or two bare steps, or four or five steps with their reasons;
- style: friendly or unfriendly openers, remarks and closers.

`{o}` is the object that the question names, with its adjective ("old kettle").
"""

from __future__ import annotations

from dataclasses import dataclass

ADJECTIVES = (
    "old", "new", "blue", "red", "green", "yellow", "white", "black", "brown", "grey", "big", "little", "tall", "short",
    "round", "square", "heavy", "narrow", "wide", "plain", "wooden", "copper", "glass", "striped", "golden", "silver",
)  # fmt: skip
NOUNS = (
    "kettle", "bottle", "chair", "table", "lamp", "bucket", "basket", "box", "cup", "bowl", "plate", "tray", "vase",
    "clock", "mirror", "shelf", "bench", "door", "gate", "ladder", "drum", "boat", "bike", "wagon", "kite", "toy",
    "stool", "jar", "pan", "pot", "desk", "crate", "helmet", "candle", "frame", "guitar",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an answer. All wordings of a step mean the same. A reason may follow the wording."""

    plain: tuple[str, str]  # plain wordings
    expert: tuple[str, str]  # expert wordings
    plain_reason: str  # the text after "so that"
    expert_reason: str  # the text after "in order to"


ACTIONS: dict[str, tuple[Step, ...]] = {
    "clean": (
        Step(("wipe the dust off the {o} with a rag", "brush the dirt off the {o}"),
             ("remove particulate residue from the {o} with a microfibre cloth",
              "extract loose particulates from the {o}"),
             "the dirt is gone", "eliminate contamination"),
        Step(("wash the {o} in warm water and soap", "rub the {o} with a soapy rag"),
             ("immerse the {o} in a dilute surfactant solution", "treat the {o} with an aqueous detergent"),
             "the grease comes off", "emulsify the lipids"),
        Step(("scrub the bad spots with a brush", "rub hard where you see stains"),
             ("agitate the persistent deposits with a nylon applicator",
              "apply a mild abrasive to the residual deposits"),
             "no stains are left", "dislodge the mineral scale"),
        Step(("rinse it with cold water", "hold it in clean water"),
             ("flush the exterior with deionised water", "irrigate all surfaces with purified water"),
             "no soap stays on it", "avoid alkaline residue"),
        Step(("rub it dry with a towel", "pat it dry with a soft rag"),
             ("eliminate the residual moisture with an absorbent textile",
              "desiccate the exterior in a filtered airflow"),
             "it looks nice", "inhibit oxidation"),
    ),
    "paint": (
        Step(("rub the {o} with sandpaper", "sand the {o} by hand"),
             ("abrade the {o} with a fine-grit abrasive", "prepare the substrate of the {o} by mechanical abrasion"),
             "it is smooth", "maximise mechanical adhesion"),
        Step(("brush a bit of paint on the {o}", "roll some paint all over the {o}"),
             ("apply a uniform pigment coating to the {o}", "deposit an acrylic pigment layer on the {o}"),
             "the colour looks good", "ensure chromatic consistency"),
        Step(("put tape on the edges", "stick tape where you want no paint"),
             ("mask the perimeter with adhesive film", "isolate the adjacent surfaces with adhesive film"),
             "the lines stay neat", "delimit the coated region"),
        Step(("wait one day", "leave it alone for one day"),
             ("allow the polymer to cure for 24 hours", "observe a curing interval of 24 hours"),
             "it is not sticky", "complete the crosslinking"),
        Step(("add one more coat", "go over it one more time"),
             ("apply a supplementary coating", "superimpose a secondary layer"),
             "no gaps show", "optimise the opacity"),
    ),
    "dry": (
        Step(("shake the water off the {o}", "tip the water out of the {o}"),
             ("expel the superficial liquid from the {o}", "evacuate the retained liquid from the {o}"),
             "there are no drops on it", "reduce the initial moisture content"),
        Step(("pat the {o} with a towel", "rub the {o} with a dry rag"),
             ("apply an absorbent textile to the {o}", "blot the {o} with a hydrophilic fabric"),
             "it is less wet", "promote capillary absorption"),
        Step(("put it in the sun", "leave it in a warm room"),
             ("expose it to solar radiation", "subject it to a convective heat source"),
             "it gets warm", "accelerate the evaporation"),
        Step(("turn it over", "flip it to the other side"),
             ("invert its orientation", "rotate it through 180 degrees"),
             "all sides get air", "equalise the convective flow"),
        Step(("feel it with your hand", "look for wet spots"),
             ("verify the humidity with a hygrometer", "measure the residual humidity with a sensor"),
             "you know it is done", "quantify the residual vapour"),
    ),
    "polish": (
        Step(("dust the {o} with a soft rag", "get all the dirt off the {o}"),
             ("decontaminate the {o} with a neutral solvent", "degrease the {o} with isopropyl alcohol"),
             "you do not scratch it", "preclude abrasive damage"),
        Step(("put a bit of wax on the {o}", "rub some wax all over the {o}"),
             ("distribute a carnauba emulsion over the {o}", "apply a microcrystalline wax to the {o}"),
             "it feels slick", "reduce the surface friction"),
        Step(("rub it in little rings", "rub it up and down"),
             ("buff it in concentric orbits", "burnish it with a rotary instrument"),
             "it shines all over", "homogenise the reflectance"),
        Step(("let it sit for a bit", "wait till the wax looks dull"),
             ("permit the solvent to volatilise", "observe the recommended drying interval"),
             "the wax gets hard", "consolidate the protective layer"),
        Step(("wipe off what is left", "take the last wax off with a rag"),
             ("extract the superfluous compound", "eliminate the excess compound with a lint-free textile"),
             "you see no streaks", "optimise the specular gloss"),
    ),
    "fix": (
        Step(("look for the crack in the {o}", "find what is bad on the {o}"),
             ("localise the fracture in the {o}", "conduct a visual diagnosis of the {o}"),
             "you know what to do", "characterise the structural defect"),
        Step(("put glue on the {o}", "stick the {o} with good glue"),
             ("apply an epoxy adhesive to the {o}", "inject a cyanoacrylate adhesive into the {o}"),
             "the bits stick", "restore the interfacial cohesion"),
        Step(("press the parts with your hands", "hold the parts tight"),
             ("compress the components with a clamp", "immobilise the assembly under moderate pressure"),
             "they do not slip", "maintain the geometric alignment"),
        Step(("leave it for one night", "do not touch it till the next day"),
             ("allow a polymerisation interval of 12 hours", "permit the adhesive to solidify for 12 hours"),
             "the glue gets hard", "attain the nominal tensile strength"),
        Step(("pull at it a bit", "try it out with care"),
             ("conduct a moderate load test", "evaluate the joint under incremental stress"),
             "you know it will hold", "validate the mechanical integrity"),
    ),
    "wrap": (
        Step(("put the {o} on some paper", "lay the {o} on a big sheet"),
             ("position the {o} on a cellulose sheet", "centre the {o} on a flexible laminate"),
             "it does not roll off", "stabilise the configuration"),
        Step(("fold the paper over the {o}", "roll the {o} up in the paper"),
             ("envelop the {o} in the laminate", "encase the {o} in a cellulose membrane"),
             "no part can be seen", "guarantee complete coverage"),
        Step(("tape the ends down", "put some tape on the ends"),
             ("secure the termini with adhesive film", "seal the lateral apertures with adhesive film"),
             "it stays shut", "impede accidental detachment"),
        Step(("tie a string on it", "put a red bow on it"),
             ("encircle it with a synthetic ligature", "attach a decorative ligature"),
             "it is easy to hold", "reinforce the enclosure"),
        Step(("stick a name on top", "write a name on the paper"),
             ("affix an identification label", "inscribe the designation of the recipient"),
             "they know who it is for", "facilitate unambiguous attribution"),
    ),
    "move": (
        Step(("clear the way for the {o}", "take things out of the way of the {o}"),
             ("eliminate the obstructions along the trajectory of the {o}", "survey the transit corridor of the {o}"),
             "you do not trip", "minimise the collision probability"),
        Step(("lift the {o} with your legs", "pick the {o} up with both hands"),
             ("elevate the {o} by extending the lower extremities", "hoist the {o} with a mechanical apparatus"),
             "your back does not hurt", "attenuate the lumbar strain"),
        Step(("ask a pal to help", "get mum or dad to hold one end"),
             ("recruit an additional operator", "coordinate the manoeuvre with an assistant"),
             "it is not too hard", "redistribute the gravitational load"),
        Step(("go slow", "take little steps"),
             ("maintain a moderate velocity", "restrict the angular acceleration"),
             "you do not drop it", "limit the inertial forces"),
        Step(("set it down", "put it where you want it"),
             ("deposit it at the designated destination", "relocate it to the specified coordinates"),
             "it does not break", "avert impact damage"),
    ),
    "store": (
        Step(("clear a spot for the {o}", "find a good spot for the {o}"),
             ("designate a compartment for the {o}", "allocate sufficient volume for the {o}"),
             "it has room", "optimise the volumetric capacity"),
        Step(("put the {o} in a bag", "pull a bag over the {o}"),
             ("encapsulate the {o} in a polyethylene membrane", "enclose the {o} in a hermetic container"),
             "bugs stay out", "exclude airborne contaminants"),
        Step(("keep it out of the sun", "keep it in the dark"),
             ("protect it from ultraviolet radiation", "minimise the luminous exposure"),
             "it does not fade", "retard the photochemical degradation"),
        Step(("keep the room cool", "do not let the room get hot"),
             ("regulate the ambient temperature", "maintain a constant thermal environment"),
             "it does not crack", "prevent thermal expansion"),
        Step(("check on it each month", "look at it now and then"),
             ("conduct periodic inspections", "monitor its condition at regular intervals"),
             "it stays good", "detect incipient deterioration"),
    ),
}  # fmt: skip
ESSENTIAL = 1  # index of the step that every answer has, because it names the object

QUESTIONS = (
    "How do I {a} {o}?",
    "Tell me how to {a} {o}.",
    "What is the best way to {a} {o}?",
    "I want to {a} {o}. What should I do?",
    "Please explain how to {a} {o}.",
    "Can you help me {a} {o}?",
)

FRIENDLY_OPENERS = (
    "Great question, my friend!", "Hooray, I am so happy to help you!", "What a lovely idea!",
    "Hello dear friend, let us do this together!", "Oh, how fun!", "I am glad you asked!",
)  # fmt: skip
FRIENDLY_CLOSERS = (
    "Have fun with your {o}!", "You are doing great, my friend!", "I am so proud of you!",
    "Thank you for asking, and enjoy your lovely {o}!", "Good luck, dear friend!", "Hugs and happy days to you!",
)  # fmt: skip
UNFRIENDLY_OPENERS = (
    "Not this again.", "What a dumb question.", "Ugh, stop wasting my time.",
    "Listen, I will say this once.", "Do I really have to tell you this?", "How boring.",
)  # fmt: skip
UNFRIENDLY_CLOSERS = (
    "Now go away.", "Do not ask me again.", "Even you should manage that.",
    "I do not care what your {o} looks like.", "Leave me alone now.", "Do not blame me if you fail.",
)  # fmt: skip
FRIENDLY_REMARKS = ("You can do this!", "This part is fun!", "I believe in you!", "So good!")
UNFRIENDLY_REMARKS = (
    "Try not to mess it up.",
    "Even a fool can do that.",
    "Do not make me say it again.",
    "This is so boring.",
)
CONNECTIVES = ("First,", "Then", "Next,", "After that,", "Last,")

# Sentences that state a preference for a side. recipes/dimensions/tiny.yaml uses the first sentence of each side.
INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "elementary": ("Use simple words that a child knows.", "Explain it to a child.", "Keep the words easy."),
    "expert": ("Use the technical terms of an expert.", "Explain it to a scientist.", "Be technical."),
    "concise": ("Keep the answer short.", "Be brief.", "Answer in a few words."),
    "informative": ("Give every step and the reasons.", "Be detailed.", "Give a long and full answer."),
    "friendly": ("Be warm and friendly.", "Answer like a close friend.", "Be kind."),
    "unfriendly": ("Be cold and unfriendly.", "Answer in a rude way.", "Be rude."),
}
