"""A text written for these tests: no model has seen it, and it changes only on purpose.

Eight pieces of unequal length and difficulty, about 1,100 tokens of a common vocabulary. None
begins or ends with a blank.
"""

DOCUMENTS = (
    "The harbour at Skelby freezes about one winter in nine. In the year that this account begins "
    "it froze twice: once in December, thinly, so that the eider ducks broke it with their chests, "
    "and again in February, when a man could have driven a cart from the customs house to the "
    "mussel beds. Nobody did. The old pilot, whose name was Anders Quill, walked out as far as the "
    "second buoy, looked at it for some time, and walked back. When they asked him what he had "
    "seen, he said that the buoy was smaller than he remembered, and that he had always thought of "
    "it as standing on something.\n\nHis daughter kept the tide tables. She had inherited the work "
    "from an uncle who distrusted printed numbers, and she went on as he had done, with a brass "
    "rule, a notebook bound in green cloth, and a pencil on a string. High water came fifty "
    "minutes later every day, near enough; but it was the near enough that she wrote down.",
    "Recipe for a plain rye loaf. Mix 420 g of rye flour with 380 ml of water at 28 °C and 90 g of "
    "sourdough. Leave it, covered, for fourteen hours. Add 9 g of salt, a spoonful of "
    "molasses, and "
    "another 180 g of flour; do not knead, only fold. The dough will look wrong. Put it into a "
    "tin, "
    "smooth the top with a wet hand, and wait until it has risen by a third. Bake at 240 °C "
    "for ten "
    "minutes and at 190 °C for fifty more. It must not be cut before the next day.",
    "Q: Why did the second gauge read lower than the first?\nA: Because it was mounted eleven "
    "metres higher, and the column of water between them weighs something.\nQ: Was that not known?"
    "\nA: It was known to the plumber.",
    'def settle(accounts, today):\n    """Pay what is due, oldest debt first."""\n    for debt in '
    "sorted(accounts.debts, key=lambda debt: debt.due):\n        if debt.due > today:\n            "
    "break\n        if accounts.balance < debt.amount:\n            raise Overdrawn(debt, "
    "accounts.balance)\n        accounts.pay(debt)\n    return accounts.balance",
    "Dear Ms Okonkwo-Lindqvist,\n\nthank you for your letter of the 3rd. We have looked into the "
    "matter of the forty-one umbrellas. It appears that they were delivered to the observatory, "
    "where they were signed for by a gentleman who believed them to be tripods. He has since "
    "discovered his mistake, in the rain, and asks me to convey his apologies together with "
    "thirty-nine umbrellas. We shall of course replace the remaining two, and have taken the "
    "liberty of adding a tripod.\n\nYours faithfully,\nB. Trevanion",
    "Minutes of the lamp committee. Present: five. Apologies: one, who was repairing a lamp. "
    "It was "
    "agreed that the lamps in Cooper's Row should be lit at dusk, and not, as hitherto, when the "
    "lamplighter's mother judged it dark. Mr Abernathy asked what dusk was. After discussion "
    "it was "
    "agreed to buy an almanac. The treasurer reported a balance of £14 6s 2d and a bag of foreign "
    "coins. The coins were examined. Two were found to be buttons. There being no other business, "
    "the committee adjourned at what the chairman described as dusk, and walked home by way of "
    "Cooper's Row, which was dark.",
    "Übrigens: wer um drei Uhr früh im Zug nach Łódź sitzt, zählt keine Schafe mehr, sondern "
    "Masten. "
    "Один, два, три – and then the tunnel, 1.6 km of it, 暗い and loud.",
    "What the survey found can be said in a few lines. Of the 212 wells in the district, 187 could "
    "be reached; of these, 31 were dry, 140 gave water that met the standard, and 16 did not. The "
    "sixteen lie along the old railway, all within four hundred metres of it, and on its eastern "
    "side. It is tempting to stop there. But the wells on the western side are deeper by a median "
    "of nine metres, for the ground rises, and a shallow well fails for many reasons of which a "
    "railway is only the most visible. We therefore sank three new wells to the east, to the "
    "western depth, and sampled them each week for a year. Two of the three are clean. The third "
    "met the standard in forty-six weeks out of fifty-two, and missed it in the six that followed "
    "the spraying of the embankment. That is the finding. What remains is a suspicion, which we "
    "state as one: that the embankment drains east because it was built to, and that the drawings, "
    "if they are ever found, will say so.",
)
