// Reads a picture. For each rectangle: the color in its middle, and the contrast (WCAG 2) of its lightest and darkest pixel.
(async (png, rectangles) => {
  const image = new Image();
  image.src = 'data:image/png;base64,' + png;
  await image.decode();
  const canvas = new OffscreenCanvas(image.width, image.height).getContext('2d', { willReadFrequently: true });
  canvas.drawImage(image, 0, 0);
  const all = canvas.getImageData(0, 0, image.width, image.height).data;
  const at = (x, y) => (Math.floor(y) * image.width + Math.floor(x)) * 4;
  const linear = c => c <= 10.31475 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4;
  const light = i => 0.2126 * linear(all[i]) + 0.7152 * linear(all[i + 1]) + 0.0722 * linear(all[i + 2]);
  return rectangles.map(r => {
    let least = 1, most = 0;
    for (let y = Math.ceil(r.y); y < Math.min(r.y + r.h, image.height); y++)
      for (let x = Math.ceil(r.x); x < Math.min(r.x + r.w, image.width); x++) {
        const here = light(at(x, y));
        least = Math.min(least, here); most = Math.max(most, here);
      }
    const middle = at(r.x + r.w / 2, r.y + r.h / 2);
    return { middle: [...all.slice(middle, middle + 3)], contrast: (most + 0.05) / (least + 0.05), width: image.width, height: image.height };
  });
})
