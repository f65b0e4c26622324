// How results of the search are ordered: as Sphinx does it, but walkthroughs stand first, and foremost those whose
// title has a word of the query. `var`: Sphinx declares it once more.
var Scorer = {
  score: ([page, title, anchor, description, score]) => {
    const words = new URLSearchParams(location.search).get("q").toLowerCase().split(/\s+/);
    if (!page.startsWith("tutorials/")) return score;
    return score + (words.some(word => title.toLowerCase().includes(word)) ? 30 : 20);
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
