"""The six ten-class subsets of ImageNet-1k on which the field reports, and how to find them in a source.

The lists and their order (which defines labels 0 to 9) are those of "Dataset Distillation by Matching Training
Trajectories" (Cazenavette et al. 2022), used unchanged by GLaD, DDiF and GSDD.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from gsdd_jax.errors import InputError

Subset = Literal["", "imagenette", "imagewoof", "imagefruit", "imageyellow", "imagemeow", "imagesquawk"]


class ImageNetClass(NamedTuple):
    """One class of ImageNet-1k: position in ILSVRC-2012 order (0 to 999, sorted by wnid), WordNet id, readable name."""

    place: int
    wnid: str
    name: str


def _table(text: str) -> tuple[ImageNetClass, ...]:
    rows = (line.split() for line in text.strip().splitlines())
    return tuple(ImageNetClass(int(place), wnid, name) for place, wnid, name in rows)


SUBSETS: dict[str, tuple[ImageNetClass, ...]] = {
    "imagenette": _table("""
        0   n01440764 tench
        217 n02102040 english_springer
        482 n02979186 cassette_player
        491 n03000684 chain_saw
        497 n03028079 church
        566 n03394916 french_horn
        569 n03417042 garbage_truck
        571 n03425413 gas_pump
        574 n03445777 golf_ball
        701 n03888257 parachute
    """),
    "imagewoof": _table("""
        193 n02096294 australian_terrier
        182 n02093754 border_terrier
        258 n02111889 samoyed
        162 n02088364 beagle
        155 n02086240 shih-tzu
        167 n02089973 english_foxhound
        159 n02087394 rhodesian_ridgeback
        273 n02115641 dingo
        207 n02099601 golden_retriever
        229 n02105641 old_english_sheepdog
    """),
    "imagefruit": _table("""
        953 n07753275 pineapple
        954 n07753592 banana
        949 n07745940 strawberry
        950 n07747607 orange
        951 n07749582 lemon
        957 n07768694 pomegranate
        952 n07753113 fig
        945 n07720875 bell_pepper
        943 n07718472 cucumber
        948 n07742313 granny_smith
    """),
    "imageyellow": _table("""
        309 n02206856 bee
        986 n12057211 yellow_lady's_slipper
        954 n07753592 banana
        951 n07749582 lemon
        987 n12144580 corn
        779 n04146614 school_bus
        599 n03530642 honeycomb
        291 n02129165 lion
        72  n01773157 garden_spider
        11  n01531178 goldfinch
    """),
    "imagemeow": _table("""
        281 n02123045 tabby
        282 n02123159 tiger_cat
        283 n02123394 persian_cat
        284 n02123597 siamese_cat
        285 n02124075 egyptian_cat
        291 n02129165 lion
        292 n02129604 tiger
        290 n02128925 jaguar
        289 n02128757 snow_leopard
        287 n02127052 lynx
    """),
    "imagesquawk": _table("""
        84  n01806143 peacock
        130 n02007558 flamingo
        88  n01818515 macaw
        144 n02051845 pelican
        145 n02056570 king_penguin
        22  n01614925 bald_eagle
        96  n01843383 toucan
        9   n01518878 ostrich
        100 n01860187 black_swan
        89  n01819313 cockatoo
    """),
}


def resolve(subset: str, class_names: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Finds the ten classes of a subset among the classes of a source.

    Tried in this order: WordNet ids ("n01440764"); the readable names above (a source that holds just these ten
    classes); bare ILSVRC numbers ("0" to "999"); the position, if there are exactly 1,000 classes that are not sorted
    by name (1,000 readable names in ILSVRC order; sorted ones would be a folder in some other order).

    Args:
        subset: A key of `SUBSETS`.
        class_names: Names of the source's classes, in label order.

    Returns:
        `(source_labels, names)`: the source label of each of the ten classes in the subset's order, and readable names.

    Raises:
        ValueError: Unknown subset, or the source does not hold the ten classes.
    """
    if subset not in SUBSETS:
        raise InputError(f"data.subset: unknown subset {subset!r}; allowed: {', '.join(SUBSETS)}")
    classes = SUBSETS[subset]
    names = tuple(entry.name for entry in classes)
    place = {_plain(name): label for label, name in enumerate(class_names)}
    for spelling in ([e.wnid for e in classes], list(names), [str(e.place) for e in classes]):
        if all(_plain(key) in place for key in spelling):
            return tuple(place[_plain(key)] for key in spelling), names
    if len(class_names) == 1000 and list(class_names) != sorted(class_names):
        return tuple(entry.place for entry in classes), names
    missing = [f"{e.wnid} ({e.name})" for e in classes if not {_plain(e.wnid), _plain(e.name)} & place.keys()]
    shown = ", ".join(class_names[:3]) + (", ..." if len(class_names) > 3 else "")
    raise InputError(
        f"data.subset: {subset!r} is not in this source; missing {', '.join(missing[:3])}"
        f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}; it has {len(class_names)} classes ({shown})"
    )


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")
