"""The tasks of the chat demo: everyday requests to an assistant, composed from templates and topics written for this project."""

from __future__ import annotations

# Genre -> (templates, topics). Topic i is put into template i modulo the number of templates, so each topic gives one task.
GENRES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "explain": (
        ("Explain how {} works.", "Explain in simple terms how {} works.", "How does {} work?"),
        (
            *("a bicycle brake", "a microwave oven", "a compass", "a lighthouse", "a thermos flask", "a zip fastener"),
            *("a solar panel", "a water tower", "a pendulum clock", "a vacuum cleaner", "a rainwater barrel", "a kite"),
            *("a pair of glasses", "a refrigerator", "a windmill", "a ballpoint pen", "a fire extinguisher", "a lock"),
            *(
                "a hot air balloon",
                "a smoke alarm",
                "a public library",
                "a barcode scanner",
                "a submarine",
                "a sundial",
            ),
            *("a hearing aid", "a pressure cooker", "a credit card", "a greenhouse", "a seat belt", "a piano"),
            *("a weather forecast", "a recycling plant", "a traffic light", "a candle", "a row boat", "a camera"),
        ),
    ),
    "why": (
        ("Why is it that {}?", "Give the main reason why {}.", "Tell me why {}."),
        (
            *("the sky is blue", "leaves fall in autumn", "bread rises", "cats purr", "the sea is salty", "ice floats"),
            *("people yawn", "onions make us cry", "birds migrate", "metal rusts", "we need sleep", "volcanoes erupt"),
            *("the moon changes its shape", "bees matter to farmers", "milk turns sour", "we get goosebumps"),
            *("some people are left-handed", "stars twinkle", "apples turn brown", "dogs wag their tails"),
            *("coffee keeps us awake", "thunder follows lightning", "snow is white", "bridges have expansion joints"),
            *("rainbows form", "salt melts ice on roads", "deserts are cold at night", "tea is good for a break"),
            *("airports have long runways", "people enjoy music", "trees have rings", "soap removes grease"),
        ),
    ),
    "ideas": (
        ("Suggest ideas for {}.", "Give me some ideas for {}.", "I need inspiration for {}. Any ideas?"),
        (
            *("a rainy afternoon", "a healthy breakfast", "a birthday party for a child", "a quick dinner", "a picnic"),
            *(
                "a gift for a teacher",
                "a weekend in the mountains",
                "a book club",
                "a small garden",
                "a school project",
            ),
            *("using old jars", "a family game night", "saving electricity", "a packed lunch", "a farewell party"),
            *(
                "decorating a small room",
                "a walk with a dog",
                "learning new words",
                "a community garden",
                "team building",
            ),
            *("a vegetarian barbecue", "keeping children busy on a train", "a photo album", "a neighbourhood festival"),
            *("spending less on groceries", "a charity sale", "a short speech", "a homemade costume", "a winter walk"),
            *("using leftover rice", "a relaxing evening", "a handmade card", "a science fair", "a new hobby"),
        ),
    ),
    "message": (
        ("Write a short message to {}.", "Write a friendly note to {}.", "Draft a brief message to {}."),
        (
            *("a neighbour about a lost cat", "a friend who passed an exam", "a colleague who is retiring"),
            *("a landlord about a leaking tap", "a teacher about a missed class", "a cousin who moved to a new town"),
            *("a dentist to change an appointment", "a friend to say sorry for being late", "a new team member"),
            *(
                "a sister about dinner on Sunday",
                "a customer whose parcel is late",
                "a coach about a cancelled practice",
            ),
            *(
                "a neighbour to thank them for watering plants",
                "a grandmother on her birthday",
                "a band after a concert",
            ),
            *("a hotel about a forgotten umbrella", "a roommate about the dishes", "a friend who feels unwell"),
            *("a librarian about an overdue book", "a guest about the house rules", "a manager to ask for a day off"),
            *("parents about a school trip", "a baker to order a cake", "a friend before a job interview"),
            *("a club about the next meeting", "a plumber to ask for a price", "a pen friend in another country"),
            *(
                "a neighbour about a noisy party",
                "volunteers after a clean-up day",
                "a photographer about wedding pictures",
            ),
        ),
    ),
    "compare": (
        ("Compare {}.", "What is the difference between {}?", "Which would you choose between {}, and why?"),
        (
            *(
                "tea and coffee",
                "a train and a bus",
                "a city and a village",
                "paper books and e-books",
                "cats and dogs",
            ),
            *("running and swimming", "summer and winter", "butter and olive oil", "renting and buying a home"),
            *("a guitar and a piano", "cash and cards", "a lake and the sea", "baths and showers", "rice and potatoes"),
            *("frogs and toads", "gas and electric stoves", "chess and checkers", "a hotel and a campsite"),
            *("emails and phone calls", "alligators and crocodiles", "wool and cotton", "a bike and a scooter"),
            *("morning and evening exercise", "films and theatre", "honey and sugar", "a laptop and a tablet"),
            *("planets and stars", "jam and marmalade", "working at home and in an office", "rivers and canals"),
        ),
    ),
    "advice": (
        ("Give me advice on how to {}.", "What is the best way to {}?", "How can I {}?"),
        (
            *("fall asleep faster", "learn a new language", "save money each month", "keep houseplants alive"),
            *("prepare for an exam", "make new friends in a new city", "drink more water", "clean a wooden table"),
            *("get over a cold", "remember names", "cook rice well", "pack a suitcase", "stop biting my nails"),
            *("train a puppy", "speak in front of a group", "ride a bike in traffic", "organise a small kitchen"),
            *("start running", "wake up early", "choose a good melon", "remove a coffee stain", "write a good letter"),
            *("spend less time on my phone", "plan a road trip", "sharpen a knife", "help a shy child", "stay calm"),
            *("keep bread fresh", "read more books", "work well in a team", "sew on a button", "grow tomatoes"),
            *("be on time", "say no politely", "prepare for a job interview", "deal with a noisy neighbour"),
        ),
    ),
    "describe": (
        ("Describe {}.", "Describe {} to someone who has never seen it.", "What is {} like?"),
        (
            *("a busy market", "a quiet forest", "a thunderstorm", "a sunrise over the sea", "an old bookshop"),
            *(
                "a snowy street",
                "a beehive",
                "a desert at noon",
                "a school playground",
                "a jazz concert",
                "a waterfall",
            ),
            *(
                "a kitchen on a holiday",
                "a night train",
                "a mountain hut",
                "a busy airport",
                "a harbour in the morning",
            ),
            *(
                "a fair at night",
                "a bakery at dawn",
                "an elephant",
                "a tidy desk",
                "a lighthouse in fog",
                "a garden in May",
            ),
            *(
                "a football match",
                "a museum of toys",
                "a camping trip",
                "an autumn park",
                "a frozen lake",
                "a puppet show",
            ),
        ),
    ),
    "story": (
        ("Tell a very short story about {}.", "Write a tiny story about {}.", "Invent a short tale about {}."),
        (
            *("a lost key", "a brave snail", "a robot that likes tea", "two friends in a boat", "a forgotten letter"),
            *(
                "a talking parrot",
                "a baker and a mouse",
                "a kite in a storm",
                "a child who finds a map",
                "a lazy dragon",
            ),
            *("a train that never stops", "a clock that runs backwards", "a fox in the city", "a broken violin"),
            *("a gardener and a giant", "a message in a bottle", "a bus driver on her last day", "a sleepy owl"),
            *("a painter without colours", "a boy who collects sounds", "the smallest elephant", "a lonely lighthouse"),
            *(
                "a race between a duck and a goose",
                "an honest thief",
                "a bridge in the mist",
                "a coat with ten pockets",
            ),
            *("a chef who lost his taste", "a tree that could walk", "a rainy wedding", "a cat on a ship"),
        ),
    ),
    "facts": (
        (
            "Tell me something interesting about {}.",
            "What should everyone know about {}?",
            "Share a few facts about {}.",
        ),
        (
            *("honey", "octopuses", "the Amazon River", "chess", "the Moon", "bamboo", "penguins", "the Olympic Games"),
            *("chocolate", "volcanoes", "bats", "the human heart", "Iceland", "bicycles", "whales", "the Great Wall"),
            *("potatoes", "lightning", "paper", "camels", "the Sahara", "glass", "ants", "jazz", "Antarctica", "bees"),
            *("the Eiffel Tower", "salt", "owls", "tea", "coral reefs", "the calendar", "silk", "dolphins", "cheese"),
        ),
    ),
    "opinion": (
        ("Is it a good idea to {}?", "Is it wise to {}?", "Should people {}?"),
        (
            *("eat dessert every day", "work four days a week", "keep a diary", "ban cars in city centres"),
            *(
                "learn to cook at school",
                "sleep with the window open",
                "give children pocket money",
                "adopt an old dog",
            ),
            *("drink coffee in the evening", "travel alone", "buy used clothes", "study with music", "share a car"),
            *("play video games", "take cold showers", "read the news every morning", "live without a television"),
            *("wear school uniforms", "skip breakfast", "learn two instruments at once", "grow their own vegetables"),
            *(
                "lend money to friends",
                "move to the countryside",
                "work at night",
                "repair things instead of buying new",
            ),
        ),
    ),
}


def tasks() -> list[tuple[str, str]]:
    """Return every task as (genre, text), in a fixed order; no text occurs twice."""
    return [
        (genre, template.format(topic))
        for genre, (templates, topics) in GENRES.items()
        for number, topic in enumerate(topics)
        for template in [templates[number % len(templates)]]
    ]
