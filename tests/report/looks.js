// What is on the page and where, for tests/report/pictures.rs. Shapes and text, in pixels of the whole page.
(() => {
  const box = r => ({ x: r.x + scrollX, y: r.y + scrollY, w: r.width, h: r.height });
  const hidden = e => !e.checkVisibility({ visibilityProperty: true });
  // A table may be wider than the page; it scrolls by itself.
  const scrolls = e => e.closest('.scroll') !== null;
  const name = row => (row?.querySelector('.name bdi') ?? row?.querySelector('.name'))?.textContent ?? '';
  const texts = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode, e = node.parentElement;
    if (!node.data.trim() || e.closest('svg') || hidden(e)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const lines = [...range.getClientRects()].map(box).filter(r => r.w > 0);
    texts.push({ text: node.data.trim(), lines, scrolls: scrolls(e), size: parseFloat(getComputedStyle(e).fontSize) });
  }
  const shapes = [...document.querySelectorAll('svg rect')].filter(e => !hidden(e)).map(e => ({
    ...box(e.getBoundingClientRect()), class: e.getAttribute('class'), fill: getComputedStyle(e).fill,
    section: (e.closest('section') || {}).id || 'head',
    name: name(e.closest('.row, .pair, .latency')),
    svg: box(e.closest('svg').getBoundingClientRect()),
  }));
  const boxes = [...document.querySelectorAll('header, section, .tile, svg, .row, .chart, p, ul')]
    .filter(e => !hidden(e)).map(e => ({ what: e.tagName + '#' + e.id + '.' + e.getAttribute('class'), ...box(e.getBoundingClientRect()) }));
  const root = document.documentElement;
  return { texts, shapes, boxes, scroll: root.scrollWidth, client: root.clientWidth, height: root.scrollHeight,
    scripts: document.scripts.length, title: document.title };
})()
