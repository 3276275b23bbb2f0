//! Rectangles, lines and words, drawn as SVG or as PNG: the same picture for a page and for where no SVG is shown.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::io;

use embedded_graphics::mono_font::MonoTextStyle;
use embedded_graphics::mono_font::ascii::FONT_7X13;
use embedded_graphics::pixelcolor::Rgb888;
use embedded_graphics::prelude::{
    Dimensions as _, DrawTarget, Drawable as _, OriginDimensions, Pixel, Point, Primitive as _,
    RgbColor as _, Size,
};
use embedded_graphics::primitives::{PrimitiveStyle, Rectangle};
use embedded_graphics::text::{Baseline, Text};

/// Pixels of one letter in both drawings.
pub(crate) const LETTER: (u32, u32) = (7, 13);

/// A colour: red, green, blue.
pub(crate) type Colour = [u8; 3];

#[derive(Debug, Clone, PartialEq, Eq)]
enum Shape {
    Box {
        at: (u32, u32),
        size: (u32, u32),
        colour: Colour,
    },
    Words {
        at: (u32, u32),
        words: String,
        colour: Colour,
    },
}

/// A picture of a size, on white. Later shapes cover earlier ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Picture {
    size: (u32, u32),
    shapes: Vec<Shape>,
}

impl Picture {
    /// Nothing drawn yet.
    pub(crate) fn new(width: u32, height: u32) -> Self {
        Self {
            size: (width, height),
            shapes: Vec::new(),
        }
    }

    /// A filled box; one without width is drawn one pixel wide.
    pub(crate) fn fill(&mut self, at: (u32, u32), size: (u32, u32), colour: Colour) {
        let size = (size.0.max(1), size.1.max(1));
        self.shapes.push(Shape::Box { at, size, colour });
    }

    /// Words from their upper left corner; what is no ASCII is a question mark.
    pub(crate) fn words(&mut self, at: (u32, u32), words: &str, colour: Colour) {
        let words = words
            .chars()
            .map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' });
        self.shapes.push(Shape::Words {
            at,
            words: words.collect(),
            colour,
        });
    }

    /// The picture as SVG 1.1.
    pub(crate) fn svg(&self) -> String {
        let (width, height) = self.size;
        let mut text = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
             font-family=\"monospace\" font-size=\"12\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
        );
        for shape in &self.shapes {
            // Writing to a string never fails.
            let _written = match shape {
                Shape::Box { at, size, colour } => writeln!(
                    text,
                    "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"{}\"/>",
                    at.0,
                    at.1,
                    size.0,
                    size.1,
                    hex(*colour)
                ),
                Shape::Words { at, words, colour } => writeln!(
                    text,
                    "<text x=\"{}\" y=\"{}\" fill=\"{}\">{}</text>",
                    at.0,
                    at.1 + LETTER.1 - 3,
                    hex(*colour),
                    escaped(words)
                ),
            };
        }
        text.push_str("</svg>\n");
        text
    }

    /// The picture as PNG.
    ///
    /// # Errors
    /// Where it is too large to encode.
    pub(crate) fn png(&self) -> io::Result<Vec<u8>> {
        let mut canvas = Canvas {
            size: Size::new(self.size.0, self.size.1),
            pixels: vec![255; self.size.0 as usize * self.size.1 as usize * 3],
        };
        for shape in &self.shapes {
            let Ok(()) = draw(shape, &mut canvas);
        }
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, self.size.0, self.size.1);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        encoder
            .write_header()
            .and_then(|mut writer| writer.write_image_data(&canvas.pixels))
            .map_err(io::Error::other)?;
        Ok(bytes)
    }
}

fn draw(shape: &Shape, canvas: &mut Canvas) -> Result<(), Infallible> {
    let point = |at: (u32, u32)| Point::new(at.0.cast_signed(), at.1.cast_signed());
    let rgb = |colour: Colour| Rgb888::new(colour[0], colour[1], colour[2]);
    match shape {
        Shape::Box { at, size, colour } => Rectangle::new(point(*at), Size::new(size.0, size.1))
            .into_styled(PrimitiveStyle::with_fill(rgb(*colour)))
            .draw(canvas),
        Shape::Words { at, words, colour } => {
            let style = MonoTextStyle::new(&FONT_7X13, rgb(*colour));
            Text::with_baseline(words, point(*at), style, Baseline::Top)
                .draw(canvas)
                .map(|_| ())
        }
    }
}

fn hex(colour: Colour) -> String {
    format!("#{:02x}{:02x}{:02x}", colour[0], colour[1], colour[2])
}

fn escaped(words: &str) -> String {
    words
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

struct Canvas {
    size: Size,
    pixels: Vec<u8>,
}

impl OriginDimensions for Canvas {
    fn size(&self) -> Size {
        self.size
    }
}

impl DrawTarget for Canvas {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(&mut self, pixels: I) -> Result<(), Infallible> {
        let (bounds, width) = (self.bounding_box(), self.size.width as usize);
        for Pixel(at, colour) in pixels {
            // What is outside of the picture is not drawn.
            if !bounds.contains(at) {
                continue;
            }
            let first = (at.y.unsigned_abs() as usize * width + at.x.unsigned_abs() as usize) * 3;
            self.pixels[first..first + 3].copy_from_slice(&[colour.r(), colour.g(), colour.b()]);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Picture {
        let mut picture = Picture::new(40, 30);
        picture.fill((2, 3), (10, 5), [200, 10, 20]);
        picture.fill((38, 28), (50, 50), [0, 0, 255]);
        picture.words((0, 12), "a<b & c", [0, 0, 0]);
        picture
    }

    #[test]
    fn both_drawings_have_the_same_boxes() {
        let svg = example().svg();
        assert!(
            svg.contains("<rect x=\"2\" y=\"3\" width=\"10\" height=\"5\" fill=\"#c80a14\"/>"),
            "{svg}"
        );
        assert!(svg.contains(">a&lt;b &amp; c</text>"), "{svg}");
        let bytes = example().png().expect("small");
        let mut reader = png::Decoder::new(io::Cursor::new(bytes))
            .read_info()
            .expect("our own");
        let mut pixels = vec![0; reader.output_buffer_size().expect("small")];
        reader.next_frame(&mut pixels).expect("our own");
        let pixel =
            |x: usize, y: usize| <[u8; 3]>::try_from(&pixels[(y * 40 + x) * 3..][..3]).expect("three");
        assert_eq!(pixel(2, 3), [200, 10, 20]);
        assert_eq!(pixel(12, 3), [255; 3]);
        assert_eq!(pixel(39, 29), [0, 0, 255], "cut at the border");
        assert!(pixels.chunks(3).any(|it| it == [0; 3]), "words are drawn");
    }
}
