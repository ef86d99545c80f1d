"""What tables 1, 3, 4, 6 to 9 and 11 of "Vanishing Feature" claim of PFM, and how it is decided."""

from __future__ import annotations

from functools import partial
from typing import Any

from kit import claims, pairs
from kit.claims import Above, AtChance, Claim, Decision, Leads, Level, accuracy
from kit.figures import label
from kit.records import Record, joined

# What claims are decided by: "equal", "a little" and "much".
EQUAL, LITTLE, MUCH = 0.02, 0.05, 0.1


def own(record: Record) -> str:
    return record["config"]["match"]


def at_start(match: Any, remedy: str, name: str | None = None) -> claims.Quantity:
    where = {"network": "PFM", "layers": 0, "match": match, "remedy": remedy}
    return accuracy(name or label(remedy), **where)


DIRECT, MATCHED = at_start("none", "none", "direct"), at_start(own, "none", "matched")
REPAIR, RESCALE, RESET = (at_start(own, remedy) for remedy in ("repair", "rescale", "reset"))
BIAS, AM = at_start(own, "bias_calibration"), at_start("activation", "none", "AM")
AM_REPAIR, AM_RESCALE, AM_RESET = (
    at_start("activation", remedy, f"AM + {label(remedy)}")
    for remedy in ("repair", "rescale", "reset")
)


def by_layers(record: Record, match: str | None = None) -> dict[int, float]:
    """Accuracy with RESET or RESCALE by l, of the matching of the run."""
    remedy = "reset" if record.rows.values(remedy="reset") else "rescale"
    rows = record.rows.where(network="PFM", remedy=remedy)
    return dict(zip(*rows.curve("layers", match=match or own(record))[:2], strict=True))


def against(record: Record, sign: int) -> Decision:
    """Whether it is ahead of activation matching (1), behind it (-1) or level (0) at all l."""
    found, other = by_layers(record), by_layers(record, "activation")
    both = [(value, other[at]) for at, value in found.items() if at in other]
    texts = [" ".join(f"{100 * pair[k]:.1f}" for pair in both) for k in (0, 1)]
    here = f"{pairs.MATCHES[own(record)]} {texts[0]}, AM {texts[1]} at l = {joined(found)}"
    if not sign:
        return claims.all_of(claims.level(record, pair, EQUAL) for pair in both), here
    first, *more = (claims.compared(record, *pair[::sign]) for pair in both)
    # By more than noise at the first l, and never the other way round.
    return claims.all_of([first, *(one for one in more if one is False)]), here


def reaches(record: Record, limit: int | None) -> Decision | None:
    """Whether the edge models' mean is reached by l = `limit` of 14; None for: at no l."""
    edge, depth, found = record["summary"]["edge_mean"], record["model"]["depth"], by_layers(record)
    late = 12 if limit and record["data"]["name"] == "cifar100" else limit
    gaps = [v - edge for at, v in found.items() if late is None or 14 * at <= late * depth]
    if not gaps:
        return None
    there = claims.reached(max(gaps), 0, claims.free(record, edge))
    at = next((f"first at l = {at}" for at, v in found.items() if v >= edge), "at none of these l")
    return there if limit or there is None else not there, f"{100 * edge:.1f} {at}"


def with_ensemble(record: Record) -> Decision:
    last, value = list(by_layers(record).items())[-1]
    ensemble = record["summary"]["ensemble"]
    here = f"{100 * value:.1f} at l = {last}, ensemble {100 * ensemble:.1f}"
    return claims.level(record, [value, ensemble], 0), here


def a_little_below(record: Record) -> Decision | None:
    below, near = Above(AM, MATCHED)(record), Level((MATCHED, AM), LITTLE)(record)
    return (claims.all_of([below[0], near[0]]), near[1]) if below and near else None


def of(match: str, *, norm: bool | None = None, residual: bool | None = None) -> Any:
    """Records of a matching, with BatchNorm or not, of residual networks or not."""

    def fits(record: Record) -> bool:
        normed = "reset" in record.rows.distinct("remedy")
        skips = record["model"]["name"].startswith("resnet")
        # Networks without BatchNorm are the paper's on CIFAR-10 alone.
        told = norm is not False or record["data"]["name"] != "cifar100"
        known = norm in (None, normed) and residual in (None, skips)
        return own(record) == match and known and told

    return fits


LEVEL = "within 2 points of it at every l; up to two standard errors more are undecided"
SOON = "reached by l = 8 of 14 (12 on CIFAR-100); up to two standard errors below are undecided"
NEVER = "reached at no l; up to two standard errors below are undecided"
SAME, LITTLE_BELOW = "within two standard errors", "by more than two standard errors, by 5 at most"
AHEAD = "by more than two standard errors at the first l, and at no l the other way round"
AT_8, LEVEL_TO_AM = partial(reaches, limit=8), partial(against, sign=0)
PLAIN, RES = of("activation", norm=False), of("activation", norm=True, residual=True)
CCA, ZIP = of("cca", norm=False), of("zipit", norm=False)
ZIP_VGG, ZIP_RES = of("zipit", residual=False), of("zipit", residual=True)
# fmt: off
CLAIMS = [
    Claim("vf.t1.direct-at-chance", "direct averages of VGG16 are at chance at l = 0",
          "10.0 (table 1)", AtChance(DIRECT), PLAIN),
    Claim("vf.t1.rescale-leads", "RESCALE is the best after activation matching", "RESCALE 84.7, "
          "bias cal. 82.9, matched 46.5, REPAIR 39.1 (table 1, l = 0; weight decay 1e-4)",
          Leads(RESCALE, (BIAS, MATCHED, REPAIR)), PLAIN),
    Claim("vf.t1.repair-below-matched", "REPAIR is below activation matching alone", "39.1 and "
          "46.5 (table 1; the paper, too, finds REPAIR reliable at large weight decay)",
          Above(MATCHED, REPAIR), PLAIN),
    Claim("vf.t1.bias-next-to-rescale", "bias calibration is next to RESCALE",
          "82.9 and 84.7 (table 1)", Level((BIAS, RESCALE), LITTLE), PLAIN),
    Claim("vf.t1.reaches-edges-at-8", "RESCALE passes the edge models at l = 8",
          "92.4 of 91.8 (table 1)", AT_8, PLAIN, by=SOON),
    Claim("vf.t1.ensemble-at-12", "RESCALE equals the ensemble at the last l",
          "92.9 at l = 12 (table 1)", with_ensemble, PLAIN, by=SAME),
    Claim("vf.t7.reset-lifts", "in ResNet20 RESET brings merged networks far above chance",
          "64.1 at l = 0 (table 7)", Above(RESET, DIRECT, MUCH), RES),
    Claim("vf.t7.ensemble-at-19", "ResNet20 with RESET equals the ensemble at the last l",
          "at l = 19 (table 7)", with_ensemble, RES, by=SAME),
    Claim("vf.t3.cca-alone", "CCA without normalisation is far above activation matching",
          "81.9 and 46.5 (table 3, l = 0)", Above(MATCHED, AM, MUCH), CCA),
    Claim("vf.t6.zipit-alone", "ZipIt! without normalisation is a little below activation matching",
          "42.6 and 46.5 (table 6, l = 0)", a_little_below, ZIP, by=LITTLE_BELOW),
    Claim("vf.t3.rescale-leads-cca", "RESCALE is the best of what is done to CCA",
          "83.1 (table 3, l = 0)", Leads(RESCALE, (MATCHED, REPAIR, BIAS)), CCA),
    Claim("vf.t6.rescale-leads-zipit", "RESCALE is the best of what is done to ZipIt!",
          "84.7 (table 6, l = 0)", Leads(RESCALE, (MATCHED, REPAIR, BIAS)), ZIP),
    Claim("vf.t3.repair-hurts-cca", "REPAIR lowers the accuracy of CCA", "81.9 to 57.7 (table 3)",
          Above(MATCHED, REPAIR), CCA),
    Claim("vf.t3.rescale-level-cca", "with RESCALE CCA has no more than activation matching",
          "83.1 and 84.7 (table 3)", Level((RESCALE, AM_RESCALE), EQUAL), CCA),
    Claim("vf.t6.repair-zipit", "with REPAIR ZipIt! is far above activation matching",
          "67.9 and 39.1 (table 6)", Above(REPAIR, AM_REPAIR, MUCH), ZIP),
    Claim("vf.t4.reset-cca", "with RESET CCA is ahead of activation matching at l = 0",
          "91.2 and 89.9 (table 4)", Above(RESET, AM_RESET), of("cca", norm=True)),
    Claim("vf.t4.cca-ahead", "with RESET CCA is ahead of activation matching at every l", "table 4",
          partial(against, sign=1), of("cca", norm=True), by=AHEAD),
    Claim("vf.t6.zipit-level", "with RESCALE or RESET ZipIt! equals activation matching in VGG16",
          "84.7 and 84.7, 89.6 and 89.9 at l = 0 (tables 6 and 8)", LEVEL_TO_AM, ZIP_VGG, by=LEVEL),
    Claim("vf.t7.zipit-below", "with RESET ZipIt! is below activation matching in ResNet20",
          "62.2 and 64.1 at l = 0 (table 7)", partial(against, sign=-1), ZIP_RES, by=AHEAD),
    Claim("vf.t7.zipit-never", "ZipIt! stays below the edge models in ResNet20",
          "even at l = 19 (table 7)", partial(reaches, limit=None), ZIP_RES, by=NEVER),
    Claim("vf.t3.cca-reaches", "CCA reaches the edge models at l = 8",
          "tables 3 and 4; at l = 10 or 12 on CIFAR-100", AT_8, of("cca"), by=SOON),
    Claim("vf.t6.zipit-reaches", "ZipIt! reaches the edge models at l = 8 in VGG16",
          "tables 6 and 8; at l = 10 or 12 on CIFAR-100", AT_8, ZIP_VGG, by=SOON),
    Claim("vf.t3.cca-ensemble", "CCA equals or passes the ensemble at l = 12", "tables 3 and 4",
          with_ensemble, of("cca"), by=SAME),
    Claim("vf.t6.zipit-ensemble", "ZipIt! equals the ensemble at l = 12 in VGG16",
          "tables 6 and 8", with_ensemble, ZIP_VGG, by=SAME),
    Claim("vf.new.transport", "optimal transport with RESCALE, beside activation matching", "",
          LEVEL_TO_AM, of("transport"), by=LEVEL),
]
# fmt: on
