// What a browser says of the page it shows: problems, each a sentence. An empty list is good.
// Called with the width of the screen in CSS pixels.
const width = arguments[0], problems = [];
const box = node => node.getBoundingClientRect();
const name = node => {
  const section = node.closest('section');
  return `${section ? section.id : node.tagName}: "${(node.textContent || '').trim().slice(0, 40)}"`;
};
const crossing = (a, b, room) =>
  Math.min(a.right, b.right) - Math.max(a.left, b.left) > room && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > room;

if (document.documentElement.scrollWidth > width) problems.push(`sideways scroll: ${document.documentElement.scrollWidth} > ${width}`);
for (const node of document.querySelectorAll('main *')) {
  const b = box(node);
  if (b.width && !node.closest('svg, thead') && b.right > width + 1) problems.push(`${name(node)} reaches beyond the page`);
}

const fetched = performance.getEntriesByType('resource').length + document.scripts.length;
if (fetched) problems.push(`${fetched} things fetched or run`);

const sections = [...document.querySelectorAll('section')];
sections.forEach((section, index) => {
  const said = [...section.children].filter(child => !child.matches('h2, .how'));
  if (!said.length || said.some(child => box(child).height < 8)) problems.push(`${section.id} is empty`);
  if (index && box(sections[index - 1]).bottom > box(section).top + 1) problems.push(`${section.id} overlaps the one before`);
  [...section.children].forEach((child, place) => {
    const before = section.children[place - 1];
    if (before && crossing(box(before), box(child), 1)) problems.push(`${section.id}: "${before.className}" and "${child.className}" overlap`);
  });
});

for (const chart of document.querySelectorAll('svg.chart')) {
  const frame = box(chart), texts = [...chart.querySelectorAll('text')], label = chart.getAttribute('aria-label');
  if (frame.width < 200 || frame.height < 40) problems.push(`${label}: only ${frame.width} x ${frame.height}`);
  const boxes = texts.map(box);
  boxes.forEach((own, index) => {
    const size = parseFloat(getComputedStyle(texts[index]).fontSize) * frame.width / chart.viewBox.baseVal.width;
    if (size < 9) problems.push(`${label}: letters of ${size.toFixed(1)} px`);
    if (own.left < frame.left - 2 || own.right > frame.right + 2 || own.top < frame.top - 2 || own.bottom > frame.bottom + 3)
      problems.push(`${label}: "${texts[index].textContent}" is cut off`);
    for (let other = index + 1; other < boxes.length; other++)
      if (crossing(own, boxes[other], 2.5)) problems.push(`${label}: "${texts[index].textContent}" over "${texts[other].textContent}"`);
  });
}

for (const word of document.querySelectorAll('.id')) {
  const looks = [word, word.parentElement].map(node => getComputedStyle(node)).map(of => of.fontWeight + of.fontSize + of.color);
  if (looks[0] !== looks[1]) problems.push(`${name(word)} looks other than what it stands in`);
  if (word.checkVisibility() && word.getClientRects().length > 1) problems.push(`${name(word)} is broken at a dash`);
}
for (const row of document.querySelectorAll('.charts')) {
  const drawn = [...row.querySelectorAll('svg')].map(box);
  const beside = drawn.filter(one => Math.abs(one.top - drawn[0].top) < 2).length;
  if (width > 1200 && drawn.length === 3 && beside !== 3) problems.push(`${name(row)}: three charts leave a hole`);
}

const numbers = colour => (colour.match(/[\d.]+/g) || []).map(Number);
const over = (front, back, alpha) => front.slice(0, 3).map((value, place) => alpha * value + (1 - alpha) * back[place]);
const ground = node => {
  for (let at = node; at; at = at.parentElement) {
    const colour = numbers(getComputedStyle(at).backgroundColor);
    if (colour.length === 3 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
};
const light = colour => {
  const [r, g, b] = colour.map(value => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
const seen = new Set();
for (const node of document.querySelectorAll('body *')) {
  if (![...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim()) || !node.checkVisibility()) continue;
  if (node.closest('title')) continue;
  const style = getComputedStyle(node), drawn = node.ownerSVGElement;
  let back = ground(drawn ? drawn.parentElement : node);
  const cell = node.closest('.cellbox rect') || (node.closest('.cellbox') && node.closest('.cellbox').querySelector('rect'));
  if (cell) back = over(numbers(getComputedStyle(cell).fill), back, parseFloat(getComputedStyle(cell).fillOpacity));
  const found = contrast(numbers(drawn ? style.fill : style.color).slice(0, 3), back.slice(0, 3));
  const key = `${node.tagName}.${node.getAttribute('class')}`;
  if (found < 4.5 && !seen.has(key)) { seen.add(key); problems.push(`contrast ${found.toFixed(2)} of ${key} in ${name(node)}`); }
}
for (const mark of document.querySelectorAll('svg .line, svg .bar, svg .mark')) {
  const style = getComputedStyle(mark), colour = mark.matches('.line') ? style.stroke : style.fill;
  const found = contrast(numbers(colour).slice(0, 3), ground(mark.ownerSVGElement.parentElement).slice(0, 3));
  const key = mark.getAttribute('class');
  if (found < 3 && !seen.has(key)) { seen.add(key); problems.push(`contrast ${found.toFixed(2)} of the figure ${key}`); }
}
return problems.slice(0, 12);
