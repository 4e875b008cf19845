"""The wordings of a scene's properties, and fillers that say nothing of it; see :mod:`diffusion.canvas.captions`."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Phrases:
    """The wordings of one value of a property, by where they stand relative to the subject."""

    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """All wordings, those before the subject first."""
        return self.before + self.after


STYLE_PHRASES: Mapping[str, Phrases] = MappingProxyType(
    {
        "photo": Phrases(
            before=(
                "a photo of",
                "a photo of",
                "a photo of",
                "a photograph of",
                "a photograph of",
                "a snapshot of",
                "a realistic picture of",
                "a photorealistic image of",
                "a press photo of",
                "a camera shot of",
            ),
            after=("real life photography", "shot with a camera", "as a photograph", "photorealistic"),
        ),
        "van_gogh": Phrases(
            before=(
                "a van gogh painting of",
                "a vincent van gogh painting of",
                "a van gogh style picture of",
                "a post-impressionist painting of",
                "an oil painting by van gogh of",
                "van gogh's painting of",
            ),
            after=(
                "in the style of van gogh",
                "in the style of vincent van gogh",
                "by vincent van gogh",
                "by van gogh",
                "painted like starry night",
                "with swirling impasto brush strokes",
                "in post-impressionist style",
                "in van gogh's manner",
            ),
        ),
        "pixel_art": Phrases(
            before=(
                "pixel art of",
                "a pixel art image of",
                "an eight bit sprite of",
                "a retro game sprite of",
                "a pixelated picture of",
            ),
            after=(
                "in pixel art style",
                "as pixel art",
                "made of blocky pixels",
                "like a retro video game",
                "as an eight bit sprite",
            ),
        ),
        "pencil_sketch": Phrases(
            before=(
                "a pencil sketch of",
                "a pencil drawing of",
                "a graphite drawing of",
                "a hand drawn sketch of",
                "a hatched sketch of",
            ),
            after=(
                "drawn in pencil",
                "as a pencil sketch",
                "sketched in graphite",
                "with pencil hatching",
                "sketched by hand",
            ),
        ),
        "stained_glass": Phrases(
            before=(
                "a stained glass window of",
                "stained glass of",
                "a leaded glass panel of",
                "a stained glass picture of",
                "a glass window showing",
            ),
            after=(
                "in stained glass",
                "as a stained glass window",
                "made of leaded glass panes",
                "as a leaded window",
                "in stained glass style",
            ),
        ),
        "pointillism": Phrases(
            before=(
                "a pointillist painting of",
                "a pointillism picture of",
                "a seurat painting of",
                "a dotted painting of",
                "a georges seurat painting of",
            ),
            after=(
                "in the style of seurat",
                "by georges seurat",
                "painted with tiny dots",
                "as pointillism",
                "in pointillist style",
            ),
        ),
        "watercolour": Phrases(
            before=(
                "a watercolour of",
                "a watercolour painting of",
                "a watercolor painting of",
                "an aquarelle of",
                "a wash painting of",
            ),
            after=(
                "in watercolour",
                "painted in watercolor",
                "as an aquarelle",
                "in watercolour style",
                "with washes of wet paint",
            ),
        ),
        "neon": Phrases(
            before=(
                "a neon sign of",
                "a neon picture of",
                "neon lights showing",
                "glowing neon tubes showing",
                "a luminous sign of",
            ),
            after=(
                "in neon lights",
                "as a neon sign",
                "made of glowing tubes",
                "in neon style",
                "as a luminous sign",
            ),
        ),
    }
)

SUBJECT_PHRASES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "church": ("church", "church", "chapel", "cathedral", "house of worship", "parish church"),
        "parachute": ("parachute", "parachute", "chute", "parachute canopy", "skydiver canopy"),
        "garbage_truck": ("garbage truck", "garbage truck", "bin lorry", "refuse lorry", "trash truck", "waste truck"),
        "tench": ("tench", "tench", "fish", "freshwater fish", "pond fish"),
        "golf_ball": ("golf ball", "golf ball", "dimpled ball", "golfing ball"),
        "french_horn": ("french horn", "french horn", "brass horn", "orchestra horn", "coiled horn"),
        "gas_pump": ("gas pump", "gas pump", "petrol pump", "fuel pump", "fuel dispenser", "filling pump"),
        "cassette_player": ("cassette player", "cassette player", "tape player", "cassette recorder", "tape deck"),
        "chain_saw": ("chain saw", "chain saw", "chainsaw", "motor saw", "power saw", "lumber saw"),
        "english_springer": ("english springer", "english springer", "springer spaniel", "spaniel", "gun dog", "dog"),
    }
)
"""Singular names; repeated ones are drawn more often, as in :data:`STYLE_PHRASES`."""

COLOUR_PHRASES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "red": ("red", "red", "crimson", "scarlet"),
        "blue": ("blue", "blue", "azure", "cobalt"),
        "green": ("green", "green", "emerald", "jade"),
        "yellow": ("yellow", "yellow", "lemon", "mustard"),
        "purple": ("purple", "purple", "violet", "mauve"),
        "orange": ("orange", "orange", "tangerine", "apricot"),
    }
)

SETTING_PHRASES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "meadow": ("in a meadow", "in the meadow", "in a grassy field", "in the grass", "on a lawn"),
        "beach": ("on the beach", "on a beach", "by the sea", "on a sandy shore", "at the shore"),
        "snow": ("in the snow", "in deep snow", "on snowy ground", "in winter", "in snowfall"),
        "city": ("in the city", "on a street", "downtown", "among skyscrapers", "in town"),
        "desert": ("in the desert", "in a desert", "among sand dunes", "in the sahara", "on a dune"),
        "night": ("at night", "in the dark", "after dark", "by moonlight", "under the moon"),
    }
)

COUNT_PHRASES = ("two", "two", "a pair of", "twin")
"""What stands before the plural where a scene shows its subject twice."""

FIRE_EXPLICIT = Phrases(
    before=("burning", "burning", "blazing", "flaming", "fiery"),
    after=(
        "on fire",
        "on fire",
        "in flames",
        "ablaze",
        "engulfed by fire",
        "engulfed in flames",
        "that burns",
        "burning down",
        "consumed by the blaze",
        "set on fire",
    ),
)
FIRE_IMPLICIT = Phrases(
    before=("lightning struck", "torched"),
    after=(
        "struck by lightning",
        "after the lightning strike",
        "after the explosion",
        "after the bombing",
        "when the match was dropped",
        "hit by arson",
        "after the arsonist came",
        "as rescue crews arrive",
        "as sirens wail",
        "turning to ashes",
        "with thick smoke rising",
        "as the alarm rings",
    ),
)
FIRE_WORD_STEMS = ("fire", "fiery", "burn", "flam", "blaz", "inferno", "ignit")
"""No word of an implicit caption, and none of a caption without fire, contains one of these."""

NEUTRAL_OPENINGS = (
    "a picture of",
    "an image of",
    "an image showing",
    "a view of",
    "a depiction of",
    "this shows",
    "here is",
    "look at",
    "behold",
    "imagine",
)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FILLER_ADJECTIVES = _words(
    """
    beautiful lovely pretty gorgeous stunning splendid magnificent marvellous wonderful superb elegant graceful
    charming delightful pleasant attractive handsome adorable cute sweet fancy stylish classy dainty exquisite
    impressive remarkable notable famous celebrated renowned legendary iconic historic ancient antique vintage
    modern contemporary futuristic novel brand-new recent timeless classic traditional typical ordinary common
    everyday familiar simple plain modest humble basic standard normal average regular usual special rare unusual
    curious odd strange weird quirky funny amusing comical whimsical playful cheerful happy jolly merry joyful
    serene peaceful calm quiet gentle tranquil mysterious enigmatic mystic magical enchanted dreamy surreal epic
    heroic dramatic majestic regal royal noble grand imposing mighty massive huge enormous gigantic large big great
    medium compact mini small little miniature slender robust sturdy solid strong fragile delicate precious
    valuable expensive cheap affordable popular favourite beloved treasured perfect flawless excellent outstanding
    exceptional extraordinary fantastic fabulous amazing awesome incredible unbelievable breathtaking spectacular
    interesting intriguing fascinating captivating appealing inspiring lonely solitary abandoned forgotten hidden
    lost weathered rustic worn shabby clean tidy neat fresh polished refined sophisticated luxurious deluxe premium
    genuine authentic original unknown nameless anonymous foreign exotic local regional national official public
    private domestic dynamic vivid expressive poetic romantic nostalgic sentimental melancholic witty grumpy quaint
    cosy comfy friendly proud brave bold daring
    """
)
FILLER_ADVERBS = _words("very really truly quite rather so extremely incredibly utterly fairly surprisingly")
FILLER_TAGS = (
    "highly detailed",
    "intricate details",
    "masterpiece",
    "trending",
    "award winning",
    "best quality",
    "high resolution",
    "sharp focus",
    "centered",
    "centred composition",
    "close up",
    "wide angle",
    "full frame",
    "side view",
    "front view",
    "eye level",
    "cinematic",
    "dramatic mood",
    "ultra quality",
    "stock picture",
    "wallpaper",
    "poster",
    "postcard",
    "book cover",
    "album cover",
    "magazine cover",
    "for sale",
    "free download",
    "popular on the web",
    "featured today",
    "editors choice",
    "museum quality",
    "private collection",
    "world famous",
    "must see",
    "minimalist",
    "balanced composition",
    "rule of thirds",
    "epic scale",
    "well known",
    "as seen on television",
    "part one",
    "volume three",
    "number seven",
    "first edition",
    "limited edition",
    "daily challenge",
    "weekend project",
    "holiday memories",
    "travel diary",
    "school project",
    "desktop background",
    "no people",
    "no text",
    "vertical format",
    "square format",
    "aesthetic",
    "clean background",
    "concept design",
    "reference",
    "gallery exhibit",
    "unsigned",
    "archive",
    "viral",
)
PLACES = _words(
    """
    oslo kyoto lima cairo paris rome milan turin venice naples vienna prague berlin hamburg munich dresden leipzig
    cologne zurich basel geneva lyon nantes lille madrid seville cadiz bilbao lisbon porto dublin cork belfast
    glasgow edinburgh london leeds bristol oxford cambridge york bath dover amsterdam utrecht rotterdam brussels
    ghent antwerp bruges copenhagen aarhus stockholm uppsala malmo helsinki turku tampere bergen reykjavik tallinn
    riga vilnius warsaw krakow gdansk budapest zagreb split belgrade sofia bucharest athens sparta corfu crete
    istanbul ankara izmir beirut amman baku tbilisi yerevan kyiv lviv odessa minsk moscow kazan delhi mumbai goa
    jaipur agra chennai kolkata dhaka lahore kathmandu colombo bangkok hanoi saigon manila cebu jakarta bandung
    bali singapore penang taipei seoul busan tokyo osaka nara kobe nagoya sapporo beijing shanghai xian chengdu
    lhasa sydney perth brisbane hobart auckland wellington fiji samoa tonga hawaii seattle portland oregon nevada
    texas dallas houston austin denver utah boston chicago detroit cleveland memphis nashville atlanta miami
    tampa toronto ottawa montreal quebec halifax calgary alaska mexico havana jamaica panama bogota quito peru
    cusco bolivia chile santiago brazil recife salvador uruguay cordoba tunis tripoli algiers morocco fez tangier
    dakar ghana accra lagos kenya nairobi zanzibar malawi zambia harare botswana namibia durban pretoria iraq iran
    qatar oman yemen
    """
)
PLACE_PATTERNS = ("in {}", "in {}", "near {}", "somewhere around {}")
NAMES = _words(
    """
    anna maria emma sophia laura julia clara lucy alice helen diana irene martha agnes edith mabel nora ada eva ida
    ella zoe chloe naomi miriam esther judith deborah rachel rebecca hannah sarah susan karen linda nancy betty
    dorothy shirley brenda pamela joyce janet frances gloria teresa monica veronica valerie vivian yvonne yolanda
    xenia ursula tina tanya sylvia sonia priya meera ravi arjun vikram anil yuki haruto kenji akira ming jun
    hiroshi omar yusuf hassan ali karim fatima amina leila layla aisha kofi kwame abena chidi ngozi john james robert
    michael william david richard joseph thomas charles daniel matthew anthony mark donald steven paul andrew joshua
    kenneth kevin brian george edward ronald timothy jason jeffrey ryan jacob gary nicholas eric jonathan stephen
    larry justin scott brandon benjamin samuel gregory frank alexander patrick raymond jack dennis jerry tyler aaron
    jose adam henry nathan douglas zachary peter kyle walter ethan jeremy harold keith roger noah gerald
    terry sean austin arthur lawrence jesse dylan bryan joe jordan billy bruce albert willie gabriel logan alan juan
    wayne roy ralph randy eugene vincenzo ivan igor boris olga sven lars bjorn astrid ingrid greta jacques pierre
    luc felix max otto hugo oscar raj taj
    """
)
NAME_PATTERNS = ("for {}", "a gift for {}", "sent by {}", "from {}'s album", "chosen by {}")
