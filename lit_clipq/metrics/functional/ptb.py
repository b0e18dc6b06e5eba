r"""The Penn Treebank tokens of the official COCO caption scorer, without Java.

That scorer runs Stanford's PTBTokenizer (CoreNLP 3.4.1, options -preserveLines -lowerCase) and then drops a list of
punctuation tokens. Stanford's is a longest-match lexer: at each place the rule that reaches furthest wins, text that it
only looks ahead at included, and among equals the first. `_RULES` states these rules as far as captions in English meet
them: contractions (it's -> it 's, don't -> do n't), abbreviations and initials that keep their full stop (st., j.r.),
numbers, times, fractions, dates, hyphenated and slashed words, ampersands in capitals, brackets, quotes, dashes.
Most of them match a caption's letters in any case; where a rule insists on capitals, so does the pattern here.

Two traits of the original are kept, since scores depend on them: brackets are lower-cased before the punctuation list
is applied, so that `-lrb-` stays a token, and a full stop between two letters does not end a word (`fork.a`).
"""

import re
from functools import lru_cache

PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)
"""Tokens that the scorer drops; compared after lower-casing, so the four brackets never match."""

_NEITHER = "_\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u218f"  # Python counts these as parts of words
_LETTER = rf"[^\W\d{_NEITHER}]"
_ALNUM = rf"[^\W{_NEITHER}]"
_APOSTROPHE = "['\u2019\u0092]"
_ANY_APOSTROPHE = "['\u2019\u0092\u2018\u0091\u201b]"
_WORD = rf"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)*"
_AUXILIARY = rf"{_APOSTROPHE}(?:(?i:re|ve|ll)|[msdMSD])"
_NOT = rf"[nN]{_ANY_APOSTROPHE}[tT]"
_NUMBER = r"(?:\d*(?:[.:,]\d+)+|\d+)"
_PIECE = rf"(?:[dDoOlL]{_ANY_APOSTROPHE}{_ALNUM})?{_ALNUM}+"
_COMPOUND = rf"{_PIECE}(?:[-_\u2010\u2011]{_PIECE})*"
_ACRONYM = r"(?:[A-Za-z](?:\.[A-Za-z])+|(?i:canada|sino|korean|eu|japan|non)-[uU]\.[sS])"
_HYPHENATED = rf"[A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:{_ACRONYM}\.|[A-Za-z0-9]+))+"
_ALTERNATIVES = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"
_CAPITALS = r"[A-Z]+(?:[+&][A-Z]+)+"
_ABBREVIATIONS = (
    "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri|ala|ariz|calif|colo|conn|ct|"
    "dak|fla|ga|ind|kan|kans|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|tenn|va|vt|wis|wisc|wyo|inc|co|cos|corp|"
    "ltd|plc|rt|bancorp|bhd|assn|univ|intl|sys|tel|est|ext|sq|jr|sr|bros|blvd|rd|esq|etc|al|seq|bldg"
)
_CASED = (
    "(?:A(?i:rk|z)|D(?i:el)|I(?i:ll)|L(?i:a)|M(?i:ass|iss)|O(?i:re)|P(?i:a)|T(?i:ex)|W(?i:ash)|[Pp]p?(?i:t)[ye](?i:s?))"
)
_TITLES = (
    "mr|mrs|ms|dr|drs|prof|profs|sen|sens|rep|reps|atty|attys|lt|col|gen|messrs|gov|govs|adm|rev|maj|sgt|cpl|pvt|"
    "mt|capt|st|ste|ave|pres|lieut|hon|brig|comdr|cmdr|pfc|spc|supt|supts|det|dept|ft|ph|vs|alex|wm|jos|cie|cf|"
    "treas|invt|elec|natl"
)
_BEFORE_NUMBERS = "nos?|figs?|ca|prop|art|pp|op"
_INSIDE = "[,;:]"  # a full stop before one of these belongs to the word

_RULES = tuple(
    re.compile(token + (f"(?P<ahead>{ahead})" if ahead else ""))
    for token, ahead in (
        (r"(?i:can)", r"(?i:not)"),
        (r"(?i:gon|wan)", r"(?i:na)"),
        (r"(?i:got)", r"(?i:ta)"),
        (r"(?i:lem|gim)", r"(?i:me)"),
        (r"</?[A-Za-z!?][^>\r\n]*>", ""),  # markup
        (r"&(?i:md|mdash|ndash);|[\u2013-\u2015\u0096\u0097]", ""),
        (r"&(?i:amp|lt|gt|quot);", ""),
        (r"'(?i:t)", r"(?i:was|is)"),
        (_WORD, _AUXILIARY),
        (r"[A-Za-z]*[A-MO-Za-mo-z]", _NOT),
        (_WORD, ""),
        (rf"{_APOSTROPHE}[nN]{_APOSTROPHE}?", ""),
        (rf"(?i:[ldj]|dunkin|somethin|ol){_APOSTROPHE}", ""),
        (rf"{_APOSTROPHE}(?i:em|till?|cause|[2-9]0s)", ""),
        (rf"[A-HJ-XZn]{_ANY_APOSTROPHE}{_LETTER}{{2,}}", ""),
        (rf"{_LETTER}+[aeiouyAEIOUY]{_ANY_APOSTROPHE}[aeiouA-Z]{_LETTER}*", ""),
        (r"(?i:cont'd\.?|'twas|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l|cap'n|c'est)", ""),
        (rf"[yY]{_APOSTROPHE}", _LETTER),
        (r"(?i:https?)://[^\s\"<>|()]+[^\s\"<>|.!?(){},-]", ""),
        (r"(?i:www)\.(?:[^\s\"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}(?:/[^\s\"<>|()]+[^\s\"<>|.!?(){},-])?", ""),
        (r"(?:[^\s\"`'<>|.!?(){},_$-]+\.)+(?i:com|net|org|edu)(?:/[^\s\"<>|()]+[^\s\"<>|.!?(){},-])?", ""),
        (r"[a-zA-Z0-9][^\s\"<>|()]*@(?:[^\s\"<>|().]+\.)*[^\s\"<>|().]+", ""),
        (rf"@[a-zA-Z_][a-zA-Z_0-9]*|#{_LETTER}+", ""),
        (_AUXILIARY, "[^A-Za-z]"),
        (_NOT, ""),
        (r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}", ""),
        (rf"[-+]?{_NUMBER}", ""),
        (r"(?:\d{1,4}[- \u00a0])?\d{1,4}\\?/\d{1,4}", ""),
        (r"-(?i:[lr][rcs]b)-|(?i:c\.d\.s|pro-|anti-|s&p-500|s&ls)", ""),
        (_ALTERNATIVES, ""),
        (r"[A-Z]*\$|#", ""),
        (rf"(?:(?i:{_ABBREVIATIONS}|(?:ed|ph)\.d)|{_CASED})\.", r"(?s:..)"),
        (rf"(?:(?i:{_ABBREVIATIONS}|(?:ed|ph)\.d)|{_CASED})\.", ""),
        (rf"(?:(?i:{_TITLES}|a\.k\.a|{_ACRONYM}|[a-z])|[Mm][ft][Gg])\.", ""),
        (rf"(?i:{_BEFORE_NUMBERS})\.", r"\s?\d"),
        (_ACRONYM, r"\s"),
        (rf"{_APOSTROPHE}\d\d", r"\s"),
        (rf"{_WORD}\.", _INSIDE),
        (
            r"(?:\(\d{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:\d{2,4}[- \u00a0])?\d{2,4}[- \u00a0])\d{3,4}[- \u00a0]?\d{3,5}"
            r"|(?:(?:\+\+?)?\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}",
            "",
        ),
        (r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]", "[^A-Za-z0-9]"),  # smileys
        (r"[-^x=~<>']_[-^x=~<>']", ""),
        (r"[\"<>\[\](){}=/]", ""),
        (r"-+", ""),
        (r"\.{3,5}|\u2026", ""),
        (r"@+|#+|_+|\*+", ""),
        (r"[,;:\u3001]|[?!]+|[.\u00a1\u00bf]", ""),
        (rf"{_HYPHENATED}\.", _INSIDE),
        (_HYPHENATED, ""),
        (rf"{_COMPOUND}\.", _INSIDE),
        (_COMPOUND, ""),
        (rf"{_CAPITALS}\.", _INSIDE),
        (_CAPITALS, ""),
        (r"'", r"[A-Za-z]\S"),
        (_AUXILIARY, ""),
        (rf"''|{_APOSTROPHE}|[`\u2018-\u201f\u0091-\u0094\u2039\u203a\u00ab\u00bb]{{1,2}}", ""),
        (
            r"[+%&~^|\\\u00a6-\u00a9\u00ac\u00ae-\u00b4\u00b6-\u00ba\u00d7\u00f7\u2016\u2017\u2020-\u2023"
            r"\u2030-\u203b\u203e-\u2042\u2044\u2100-\u214f\u2190-\u2bff]",
            "",
        ),
        (r"[\u00a2-\u00a5\u20a0-\u20ac]", ""),
        (r"[\u00bc-\u00be\u2153-\u215e]", ""),
        (r"[\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)", ""),
    )
)
_REWRITTEN = {
    '"': "''", "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "&lt;": "<", "&gt;": ">", "&quot;": "''",
    "{": "-lcb-", "}": "-rcb-", "---": "--", "----": "--", "....": "...", ".....": "...", "\u2026": "...", "&amp;": "&",
    "\u00a2": "cents", "\u00a3": "#", "\u00a4": "$", "\u20a0": "$", "\u20ac": "$",
    "\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3",
}  # fmt: skip
_DASHES = re.compile(r"&(?:md|mdash|ndash);|[\u2013-\u2015\u0096\u0097]")
_QUOTES = re.compile("[`'\u2018-\u201f\u0091-\u0094\u2039\u203a\u00ab\u00bb]+")
_CURLY = str.maketrans("\u2019\u0092\u2018\u0091\u201b", "'''''")
_CONTRACTED = re.compile(rf"{_AUXILIARY}|{_NOT}")
_OPENINGS = (
    "About|According|Additionally|After|An|A|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|Many|More|Now|"
    "Once|One|Other|Our|She|Since|So|Some|Such|That|The|Then|There|These|They|This|We|When|While|What|Yet|You"
)
_LAST_LETTER = re.compile(rf"(?<![\w.'])(?<!\w-)([A-Za-z])\.(?=\s*$|\s+(?:{_OPENINGS})\s)")
"""A single letter that ends a sentence: its full stop is that of the sentence; elsewhere it is that of an initial."""
_SPACED = re.compile(
    rf"\d[ \u00a0]+\d|\(\d{{2,3}}\) |<[A-Za-z!?/]|(?i:\b(?:{_BEFORE_NUMBERS})\.) \d"
)  # rules that look beyond a space


def ptb_tokens(caption: str) -> str:
    r"""Tokenise a caption as the official scorer does.

    Args:
        caption: one caption. Line breaks count as spaces.

    Returns:
        Lower-case tokens without punctuation, joined by single spaces; empty where nothing is left. A fraction or
        telephone number with a space is one token with a no-break space in it, as in the original.

    Example:
        >>> ptb_tokens('The "big" dog isn\'t on St. Mark\'s Ave., is it?')
        "the big dog is n't on st. mark 's ave. is it"
        >>> ptb_tokens("At 12:45 a M&M (red/yellow) can't cost 1 1/2 euros -- cannot it?")
        "at 12:45 a m&m -lrb- red/yellow -rrb- ca n't cost 1\xa01/2 euros can not it"
    """
    caption = _LAST_LETTER.sub(r"\1", caption)
    caption = caption.replace("&nbsp;", " ")
    parts = [caption] if _SPACED.search(caption) else caption.split()
    return " ".join([token for part in parts for token in _scan(part)])


@lru_cache(maxsize=2**16)
def _scan(text: str) -> tuple[str, ...]:
    """Cut a text into tokens; it counts as followed by a space."""
    text = text.replace("\u00ad", "") + " "
    tokens = []
    place, end = 0, len(text) - 1
    while place < end:
        best, reach = None, place
        for rule in _RULES:
            match = rule.match(text, place)
            if match is not None and match.end() > reach:
                best, reach = match, match.end()
        if best is None:  # a space, or a character that the original deletes as untokenizable
            place += 1
            continue
        stop = best.start("ahead") if "ahead" in best.re.groupindex else best.end()
        token = _normalise(text[place:stop])
        if token not in PUNCTUATION:
            tokens.append(token)
        place = stop
    return tuple(tokens)


def _normalise(token: str) -> str:
    token = token.lower()
    if token in _REWRITTEN:
        return _REWRITTEN[token]
    if _DASHES.fullmatch(token):
        return "--"
    if _QUOTES.fullmatch(token):
        return "'"
    if _CONTRACTED.fullmatch(token):
        return token.translate(_CURLY)
    for old, new in (("&amp;", "&"), (" ", "\u00a0"), ("(", "-lrb-"), (")", "-rrb-")):
        token = token.replace(old, new)
    return token
