// The last lines of a page's script: every place with data becomes a page; one that cannot keeps its picture.
for (const place of document.querySelectorAll(".qcal:not([data-alive])")) {
  const data = document.getElementById(`${place.id}-data`);
  place.dataset.alive = "";
  alive(place, data.textContent, JSON.parse(place.dataset.state)).catch((error) => {
    delete place.dataset.alive;
    console.error(error);
  });
}
