"""Splitting a prompt and misspelling, letter by letter."""


def split(prompt: str, texts: list[str]) -> list[str]:
    """What stays and what is found, in turn: scan from the left and take the longest whole-word text at each place."""
    pieces, rest, place = [], "", 0
    while place < len(prompt):
        fitting = []
        for text in texts:
            end = place + len(text)
            starts = place == 0 or not is_word(prompt[place - 1])
            ends = end == len(prompt) or (end < len(prompt) and not is_word(prompt[end]))
            if prompt[place:end].lower() == text.lower() and starts and ends:
                fitting.append(text)
        if fitting:
            length = max(len(text) for text in fitting)
            pieces += [rest, prompt[place : place + length]]
            rest, place = "", place + length
        else:
            rest += prompt[place]
            place += 1
    return [*pieces, rest]


def is_word(letter: str) -> bool:
    """Letters, digits and the underscore make words."""
    return letter.isalnum() or letter == "_"


def misspellings(word: str) -> set[str]:
    """All words that a swap of two neighbours, a lost letter or a doubled letter makes of a word of letters alone."""
    made = set()
    for place in range(len(word)):
        letters = list(word)
        del letters[place]
        made.add("".join(letters))
        letters = list(word)
        letters.insert(place, word[place])
        made.add("".join(letters))
        if place:
            letters = list(word)
            letters[place - 1], letters[place] = letters[place], letters[place - 1]
            made.add("".join(letters))
    return made - {word}
