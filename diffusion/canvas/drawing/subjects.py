"""What scenes show."""

from collections.abc import Callable

from PIL import ImageDraw

from diffusion.canvas.drawing.pixels import DARK, GLASS, GREY, LIGHT_GREY, WHITE, Rgb, scaled


def _church(pen: ImageDraw.ImageDraw, body: Rgb) -> None:
    slate = (72, 76, 92)
    pen.rectangle((50, 72, 120, 126), fill=body)
    pen.polygon([(46, 74), (60, 46), (112, 46), (126, 74)], fill=slate)
    pen.rectangle((14, 50, 54, 126), fill=scaled(body, 0.88))
    pen.polygon([(8, 52), (34, 14), (60, 52)], fill=slate)
    pen.line([(34, 0), (34, 18)], fill=DARK, width=6)
    pen.line([(26, 7), (42, 7)], fill=DARK, width=5)
    pen.pieslice((24, 88, 44, 116), 180, 360, fill=DARK)
    pen.rectangle((24, 102, 44, 126), fill=DARK)
    pen.ellipse((26, 60, 42, 76), fill=GLASS)
    for left in (64, 84, 104):
        pen.pieslice((left, 82, left + 10, 98), 180, 360, fill=GLASS)
        pen.rectangle((left, 90, left + 10, 110), fill=GLASS)


def _parachute(pen: ImageDraw.ImageDraw, body: Rgb) -> None:
    for rim in (5, 30, 50, 78, 98, 123):
        pen.line([(rim, 48), (64, 100)], fill=DARK, width=3)
    pen.pieslice((2, 2, 126, 100), 180, 360, fill=body)
    pen.pieslice((24, 2, 104, 100), 180, 360, fill=WHITE)
    pen.pieslice((46, 2, 82, 100), 180, 360, fill=body)
    pen.ellipse((57, 88, 71, 102), fill=(232, 190, 156))
    pen.rectangle((56, 101, 72, 116), fill=DARK)
    pen.line([(59, 114), (56, 126)], fill=DARK, width=6)
    pen.line([(69, 114), (72, 126)], fill=DARK, width=6)


def _garbage_truck(pen: ImageDraw.ImageDraw, body: Rgb) -> None:
    pen.polygon([(2, 52), (14, 24), (82, 24), (88, 34), (88, 96), (8, 96)], fill=body)
    pen.polygon([(2, 52), (14, 24), (24, 24), (24, 96), (8, 96)], fill=scaled(body, 0.6))
    for left in (42, 62):
        pen.rectangle((left, 30, left + 4, 88), fill=scaled(body, 0.65))
    pen.polygon([(91, 46), (112, 46), (125, 70), (125, 96), (91, 96)], fill=WHITE)
    pen.polygon([(98, 52), (110, 52), (119, 70), (98, 70)], fill=(96, 150, 186))
    pen.rectangle((6, 94, 126, 101), fill=DARK)
    for centre in (30, 60, 107):
        pen.ellipse((centre - 14, 88, centre + 14, 116), fill=DARK)
        pen.ellipse((centre - 6, 96, centre + 6, 108), fill=LIGHT_GREY)


def _tench(pen: ImageDraw.ImageDraw, body: Rgb) -> None:
    fin = scaled(body, 0.68)
    pen.polygon([(92, 64), (126, 32), (117, 64), (126, 96)], fill=fin)
    pen.polygon([(40, 42), (58, 20), (82, 44)], fill=fin)
    pen.polygon([(46, 86), (62, 106), (76, 82)], fill=fin)
    pen.ellipse((2, 34, 106, 94), fill=body)
    pen.chord((8, 38, 100, 92), 25, 155, fill=scaled(WHITE, 0.95))
    for left, top in ((46, 44), (62, 48), (78, 52), (54, 58), (70, 62)):
        pen.arc((left - 7, top, left + 7, top + 16), 280, 440, fill=fin, width=3)
    pen.arc((10, 38, 40, 90), 290, 430, fill=fin, width=4)
    pen.ellipse((14, 48, 28, 62), fill=WHITE)
    pen.ellipse((17, 51, 25, 59), fill=DARK)
    pen.line([(3, 70), (16, 74)], fill=DARK, width=4)


def _golf_ball(pen: ImageDraw.ImageDraw, body: Rgb) -> None:
    pen.polygon([(38, 94), (90, 94), (74, 108), (70, 127), (58, 127), (54, 108)], fill=LIGHT_GREY)
    pen.ellipse((14, 0, 114, 100), fill=body)
    dimple = scaled(body, 0.62)
    for row, y in enumerate(range(14, 100, 18)):
        for x in range(24 + 10 * (row % 2), 112, 20):
            if (x - 64) ** 2 + (y - 50) ** 2 < 42**2:
                pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill=dimple)
    pen.ellipse((34, 14, 54, 30), fill=WHITE)


def _french_horn(pen: ImageDraw.ImageDraw, body: Rgb) -> None:
    tube = scaled(body, 0.72)
    pen.line([(4, 4), (34, 40)], fill=tube, width=8)
    pen.ellipse((0, 0, 12, 12), fill=LIGHT_GREY)
    pen.ellipse((12, 18, 98, 104), outline=body, width=14)
    pen.ellipse((34, 40, 76, 82), outline=tube, width=8)
    for left in (38, 51, 64):
        pen.rectangle((left, 28, left + 8, 62), fill=LIGHT_GREY)
    pen.polygon([(58, 90), (84, 66), (126, 78), (78, 127)], fill=body)
    pen.polygon([(126, 74), (128, 96), (98, 127), (74, 127)], fill=DARK)


def _gas_pump(pen: ImageDraw.ImageDraw, body: Rgb) -> None:
    pen.line([(80, 34), (104, 34), (112, 50), (112, 98), (104, 106), (96, 98), (96, 70)], fill=DARK, width=7)
    pen.polygon([(100, 24), (118, 24), (122, 50), (104, 50)], fill=GREY)
    pen.rounded_rectangle((18, 2, 84, 120), 10, fill=body)
    pen.rectangle((12, 114, 90, 127), fill=DARK)
    pen.rectangle((28, 14, 74, 46), fill=WHITE)
    pen.rectangle((34, 20, 68, 26), fill=DARK)
    pen.rectangle((34, 33, 58, 39), fill=DARK)
    pen.rectangle((28, 58, 74, 66), fill=scaled(body, 0.6))
    pen.ellipse((40, 76, 62, 98), fill=WHITE)


def _cassette_player(pen: ImageDraw.ImageDraw, body: Rgb) -> None:
    pen.rounded_rectangle((22, 14, 106, 60), 8, outline=DARK, width=7)
    pen.rounded_rectangle((1, 34, 127, 112), 8, fill=body)
    for centre in (24, 104):
        pen.ellipse((centre - 19, 60, centre + 19, 98), fill=DARK)
        pen.ellipse((centre - 8, 71, centre + 8, 87), fill=GREY)
    pen.rectangle((46, 62, 82, 100), fill=WHITE)
    for centre in (56, 72):
        pen.ellipse((centre - 6, 72, centre + 6, 84), fill=DARK)
    pen.rectangle((50, 90, 78, 95), fill=GREY)
    for left in range(12, 112, 18):
        pen.rectangle((left, 42, left + 10, 52), fill=LIGHT_GREY)


def _chain_saw(pen: ImageDraw.ImageDraw, body: Rgb) -> None:
    for left in range(4, 66, 12):
        pen.polygon([(left, 62), (left + 4, 52), (left + 8, 62)], fill=DARK)
        pen.polygon([(left, 88), (left + 4, 98), (left + 8, 88)], fill=DARK)
    pen.rounded_rectangle((0, 60, 80, 90), 14, fill=DARK)
    pen.rounded_rectangle((6, 66, 80, 84), 8, fill=LIGHT_GREY)
    pen.arc((56, 22, 104, 90), 180, 360, fill=DARK, width=8)
    pen.rounded_rectangle((98, 56, 127, 96), 10, outline=DARK, width=8)
    pen.polygon([(60, 54), (72, 44), (104, 44), (112, 58), (112, 100), (66, 104)], fill=body)
    pen.ellipse((74, 62, 100, 88), fill=scaled(body, 0.6))
    pen.ellipse((81, 69, 93, 81), fill=WHITE)


def _english_springer(pen: ImageDraw.ImageDraw, body: Rgb) -> None:
    coat = (240, 236, 228)
    shadow = (190, 184, 176)
    pen.line([(20, 58), (2, 38)], fill=body, width=9)
    for left, fill in ((26, shadow), (84, shadow), (14, coat), (72, coat)):
        pen.rectangle((left, 78, left + 12, 124), fill=fill)
    pen.rounded_rectangle((10, 48, 98, 94), 20, fill=coat)
    pen.chord((10, 48, 56, 96), 150, 400, fill=body)
    pen.ellipse((54, 46, 84, 78), fill=body)
    pen.polygon([(76, 54), (88, 20), (112, 28), (98, 84), (82, 88)], fill=coat)
    pen.ellipse((82, 6, 116, 42), fill=body)
    pen.rounded_rectangle((100, 24, 127, 42), 7, fill=coat)
    pen.ellipse((119, 22, 128, 31), fill=DARK)
    pen.ellipse((103, 15, 110, 22), fill=DARK)
    pen.ellipse((78, 14, 96, 58), fill=scaled(body, 0.62))


SUBJECTS: dict[str, Callable[[ImageDraw.ImageDraw, Rgb], None]] = {
    "church": _church,
    "parachute": _parachute,
    "garbage_truck": _garbage_truck,
    "tench": _tench,
    "golf_ball": _golf_ball,
    "french_horn": _french_horn,
    "gas_pump": _gas_pump,
    "cassette_player": _cassette_player,
    "chain_saw": _chain_saw,
    "english_springer": _english_springer,
}
