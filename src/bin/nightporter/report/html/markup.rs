//! Writes HTML that is XML as well: what is opened is closed, and text is escaped, because nothing else can be said.

use std::fmt::{Display, Write};

/// A document in the making.
#[derive(Debug, Default)]
pub(super) struct Markup(String);

/// An attribute's name and value.
pub(super) type Attribute<'a> = (&'a str, &'a dyn Display);

/// Elements that have no content (HTML §13.1.2).
const VOID: [&str; 3] = ["br", "link", "meta"];

impl Markup {
    /// A document, its style sheet in place.
    pub(super) fn document(title: &str, css: &str, body: impl FnOnce(&mut Self)) -> String {
        let mut page = Self("<!DOCTYPE html>\n".into());
        page.element("html", &[("lang", &"en"), ("xmlns", &"http://www.w3.org/1999/xhtml")], |page| {
            page.element("head", &[], |page| {
                page.empty("meta", &[("charset", &"utf-8")]);
                page.empty("meta", &[("name", &"viewport"), ("content", &"width=device-width, initial-scale=1")]);
                // Whatever is in the names of apps: this page loads and runs nothing.
                let policy =
                    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'";
                page.empty("meta", &[("http-equiv", &"Content-Security-Policy"), ("content", &policy)]);
                page.empty("meta", &[("name", &"color-scheme"), ("content", &"light dark")]);
                page.empty("link", &[("rel", &"icon"), ("href", &"data:,")]);
                page.leaf("title", &[], title);
                // Ours, with none of XML's special characters in it: a browser would not read references in it.
                page.element("style", &[], |page| page.0.push_str(css));
            });
            page.element("body", &[], body);
        });
        page.0.push('\n');
        page.0
    }

    pub(super) fn element(
        &mut self,
        name: &'static str,
        attributes: &[Attribute<'_>],
        content: impl FnOnce(&mut Self),
    ) {
        self.open(name, attributes);
        self.0.push('>');
        content(self);
        let _ = write!(self.0, "</{name}>");
    }

    /// An element with text alone.
    pub(super) fn leaf(&mut self, name: &'static str, attributes: &[Attribute<'_>], text: impl Display) {
        self.element(name, attributes, |page| page.text(text));
    }

    /// An element without content.
    pub(super) fn empty(&mut self, name: &'static str, attributes: &[Attribute<'_>]) {
        self.open(name, attributes);
        let is_html = VOID.contains(&name);
        self.0.push_str(if is_html { "/>" } else { "></" });
        if !is_html {
            let _ = write!(self.0, "{name}>");
        }
    }

    pub(super) fn text(&mut self, text: impl Display) {
        escape(&mut self.0, &text.to_string());
    }

    fn open(&mut self, name: &str, attributes: &[Attribute<'_>]) {
        let _ = write!(self.0, "<{name}");
        for (key, value) in attributes {
            let _ = write!(self.0, " {key}=\"");
            escape(&mut self.0, &value.to_string());
            self.0.push('"');
        }
    }
}

/// Text that is nothing but text, within an element or an attribute; what XML does not allow is replaced.
fn escape(out: &mut String, text: &str) {
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\t' | '\n' => out.push(c),
            // Those that turn the direction of what follows would let a name change how its neighbours read.
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_text_says_it_stays_text() {
        let mut page = Markup::default();
        let hostile = "</script><b a='1\">&amp;\u{0}\u{1b}\u{202e}\u{ffff}";
        page.leaf("p", &[("title", &hostile)], hostile);
        page.empty("meta", &[]);
        page.empty("rect", &[]);
        let text = "&lt;/script&gt;&lt;b a=&#39;1&quot;&gt;&amp;amp;\u{fffd}\u{fffd}\u{fffd}\u{fffd}";
        assert_eq!(page.0, format!("<p title=\"{text}\">{text}</p><meta/><rect></rect>"));
    }
}
