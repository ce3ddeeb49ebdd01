"""What the second tables of the hard set say: common knowledge, written down by hand.

The data files hold one table each. A join needs another one: the maker of a car, the state of an airport. Knows nothing
of files or questions.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "COMMANDERS",
    "COMPANIES",
    "GENERA",
    "MAKERS",
    "MAKER_SPELLINGS",
    "MONARCHS",
    "MONTHS",
    "PRESIDENTS",
    "SECTORS",
    "SITES",
    "SOURCES",
    "SPECIES",
    "STATES",
    "in_office",
]

Facts = list[dict[str, Any]]


def _facts(names: str, *rows: tuple[Any, ...]) -> Facts:
    return [dict(zip(names.split(), row, strict=True)) for row in rows]


#: makers of cars: None where no group owned it in the 1970s
MAKERS = _facts(
    "brand country owner founded",
    ("amc", "USA", None, 1954), ("audi", "Germany", "Volkswagen", 1909), ("bmw", "Germany", None, 1916),
    ("buick", "USA", "General Motors", 1903), ("cadillac", "USA", "General Motors", 1902),
    ("chevrolet", "USA", "General Motors", 1911), ("chrysler", "USA", "Chrysler", 1925),
    ("citroen", "France", "Peugeot", 1919), ("datsun", "Japan", "Nissan", 1931), ("dodge", "USA", "Chrysler", 1900),
    ("fiat", "Italy", None, 1899), ("ford", "USA", "Ford", 1903), ("honda", "Japan", None, 1948),
    ("international", "USA", None, 1902), ("mazda", "Japan", None, 1920), ("mercedes", "Germany", None, 1926),
    ("mercury", "USA", "Ford", 1938), ("nissan", "Japan", "Nissan", 1933),
    ("oldsmobile", "USA", "General Motors", 1897), ("opel", "Germany", "General Motors", 1862),
    ("peugeot", "France", "Peugeot", 1810), ("plymouth", "USA", "Chrysler", 1928),
    ("pontiac", "USA", "General Motors", 1926), ("renault", "France", None, 1899), ("saab", "Sweden", None, 1945),
    ("subaru", "Japan", None, 1953), ("toyota", "Japan", None, 1937), ("triumph", "United Kingdom", None, 1885),
    ("volkswagen", "Germany", "Volkswagen", 1937), ("volvo", "Sweden", None, 1927),
)  # fmt: skip
#: as the file spells some of them
MAKER_SPELLINGS = {
    "capri": "ford",
    "chevroelt": "chevrolet",
    "chevy": "chevrolet",
    "hi": "international",
    "maxda": "mazda",
    "mercedes-benz": "mercedes",
    "toyouta": "toyota",
    "vokswagen": "volkswagen",
    "vw": "volkswagen",
}

COMPANIES = _facts(
    "ticker company industry headquarters founded",
    ("MSFT", "Microsoft", "software", "Washington", 1975), ("AMZN", "Amazon", "retail", "Washington", 1994),
    ("IBM", "IBM", "hardware", "New York", 1911), ("GOOG", "Google", "internet", "California", 1998),
    ("AAPL", "Apple", "hardware", "California", 1976),
)  # fmt: skip

_REGIONS = {  # of the US Census Bureau
    "Northeast": "CT ME MA NH RI VT NJ NY PA",
    "Midwest": "IL IN MI OH WI IA KS MN MO NE ND SD",
    "South": "DE FL GA MD NC SC VA DC WV AL KY MS TN AR LA OK TX",
    "West": "AZ CO ID MT NV NM UT WY AK CA HI OR WA",
}
_COASTAL = set("CT ME MA NH RI NJ NY DE FL GA MD NC SC VA AL MS LA TX AK CA HI OR WA".split())
#: None where no ocean, and no region, is: the territories are in none of the four
STATES = [
    {"code": code, "region": region, "coast": "yes" if code in _COASTAL else "no"}
    for region, codes in _REGIONS.items()
    for code in codes.split()
] + [{"code": code, "region": None, "coast": "yes"} for code in "AS CQ GU PR VI".split()]

_SEASONS = {"winter": (12, 1, 2), "spring": (3, 4, 5), "summer": (6, 7, 8), "autumn": (9, 10, 11)}
_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
MONTHS = [
    {"number": month, "season": season, "length": _DAYS[month - 1]}
    for month in range(1, 13)
    for season, months in _SEASONS.items()
    if month in months
]

#: columns of the employment file: which part of the economy, and who employs
SECTORS = _facts(
    "industry part employer",
    ("mining and logging", "goods", "private"), ("construction", "goods", "private"),
    ("durable goods", "goods", "private"), ("nondurable goods", "goods", "private"),
    ("wholesale trade", "trade", "private"), ("retail trade", "trade", "private"),
    ("transportation and warehousing", "trade", "private"), ("utilities", "trade", "private"),
    ("information", "services", "private"), ("financial activities", "services", "private"),
    ("leisure and hospitality", "services", "private"), ("other services", "services", "private"),
    ("government", "services", "public"),
)  # fmt: skip

#: of the United States, with the first year that each was in office in July
PRESIDENTS = _facts(
    "surname party home_state since",
    ("Eisenhower", "Republican", "Kansas", 1953), ("Kennedy", "Democratic", "Massachusetts", 1961),
    ("Johnson", "Democratic", "Texas", 1964), ("Nixon", "Republican", "California", 1969),
    ("Ford", "Republican", "Michigan", 1975), ("Carter", "Democratic", "Georgia", 1977),
    ("Reagan", "Republican", "California", 1981), ("George H. W. Bush", "Republican", "Texas", 1989),
    ("Clinton", "Democratic", "Arkansas", 1993), ("George W. Bush", "Republican", "Texas", 2001),
    ("Obama", "Democratic", "Illinois", 2009),
)  # fmt: skip

SOURCES = _facts(
    "fuel carbon_free renewable",
    ("Fossil Fuels", "no", "no"), ("Nuclear Energy", "yes", "no"), ("Renewables", "yes", "yes"),
)  # fmt: skip

#: of the barley trials, all in Minnesota
SITES = _facts(
    "town part_of_state degrees_north",
    ("University Farm", "centre", 44.99), ("Waseca", "south", 44.08), ("Morris", "west", 45.59),
    ("Crookston", "north", 47.77), ("Grand Rapids", "north", 47.24), ("Duluth", "north", 46.79),
)  # fmt: skip

#: None where the group is mixed
GENERA = _facts(
    "family shape",
    ("Salmonella", "rod"), ("Staphylococcus", "sphere"), ("Streptococcus", "sphere"), ("other", None),
)  # fmt: skip

#: of England, then Great Britain; the day of accession, and the first year that began before July under each
MONARCHS = _facts(
    "sovereign house crowned sex since",
    ("Elizabeth I", "Tudor", "1558-11-17", "female", 1559), ("James I", "Stuart", "1603-03-24", "male", 1603),
    ("Charles I", "Stuart", "1625-03-27", "male", 1625), (None, None, None, None, 1649),
    ("Charles II", "Stuart", "1660-05-29", "male", 1660), ("James II", "Stuart", "1685-02-06", "male", 1685),
    ("William III", "Orange", "1689-02-13", "male", 1689), ("Anne", "Stuart", "1702-03-08", "female", 1702),
    ("George I", "Hanover", "1714-08-01", "male", 1715), ("George II", "Hanover", "1727-06-11", "male", 1727),
    ("George III", "Hanover", "1760-10-25", "male", 1761), ("George IV", "Hanover", "1820-01-29", "male", 1820),
)  # fmt: skip

#: of the British army in the Crimea, with the first month that each began in command
COMMANDERS = _facts(
    "general birth_year title since",
    ("Raglan", 1788, "baron", "1854-04"), ("Simpson", 1792, None, "1855-07"), ("Codrington", 1804, None, "1855-12"),
)  # fmt: skip

SPECIES = _facts(
    "latin common_name chromosomes",
    ("setosa", "bristle-pointed iris", 38), ("versicolor", "blue flag", 108), ("virginica", "southern blue flag", 70),
)  # fmt: skip


def in_office(holders: Facts, name: str, when: int | str) -> Any:
    """The ``name`` of the last of ``holders`` whose ``since`` is not after ``when``."""
    return next(one[name] for one in reversed(holders) if one["since"] <= when)
