//! A table that fits the terminal: what matters least goes first, names lose their beginning last.

use crate::render::clean;

/// Between two columns.
const GAP: usize = 2;
/// Names are cut down to this before a column of figures goes.
const NAME: usize = 16;

/// A column of a [`Grid`].
#[derive(Debug)]
pub(super) struct Column {
    head: String,
    cells: Vec<String>,
    right: bool,
    /// Higher goes later.
    worth: u8,
}

/// Columns, the first of which has the names.
#[derive(Debug, Default)]
pub(super) struct Grid(Vec<Column>);

impl Column {
    /// A column that goes before all of greater worth.
    pub(super) fn new(head: impl Into<String>, worth: u8, cells: impl Iterator<Item = String>) -> Self {
        Self { head: head.into(), cells: cells.map(|cell| clean(&cell)).collect(), right: false, worth }
    }

    /// Aligned to the right.
    pub(super) fn right(self) -> Self {
        Self { right: true, ..self }
    }

    fn width(&self) -> usize {
        let cells = self.cells.iter().map(String::as_str);
        cells.chain([self.head.as_str()]).map(|cell| cell.chars().count()).max().unwrap_or(0)
    }
}

impl Grid {
    pub(super) fn new(columns: Vec<Column>) -> Self {
        Self(columns)
    }

    /// Puts other cells into the column of this worth, if it is still there.
    pub(super) fn fill(&mut self, worth: u8, cells: impl Iterator<Item = String>) {
        if let Some(column) = self.0.iter_mut().find(|column| column.worth == worth) {
            column.cells = cells.collect();
        }
    }

    pub(super) fn has(&self, worth: u8) -> bool {
        self.0.iter().any(|column| column.worth == worth)
    }

    /// How wide it is.
    pub(super) fn width(&self) -> usize {
        self.0.iter().map(Column::width).sum::<usize>() + GAP * self.0.len().saturating_sub(1)
    }

    /// Leaves columns out and cuts names until it is at most `width` wide.
    pub(super) fn fit(&mut self, width: usize) {
        let spare = self.0.first().map_or(0, |names| names.width().saturating_sub(NAME));
        while self.width() > width.saturating_add(spare) && self.0.len() > 2 {
            let Some(least) = (1..self.0.len()).min_by_key(|index| self.0[*index].worth) else { break };
            self.0.remove(least);
        }
        let over = self.width().saturating_sub(width);
        if let Some(names) = self.0.first_mut()
            && over > 0
        {
            let most = names.width().saturating_sub(over).max(NAME / 2);
            names.cells.iter_mut().for_each(|name| *name = ended(name, most));
        }
    }

    /// Head and rows.
    pub(super) fn text(&self) -> String {
        let widths: Vec<usize> = self.0.iter().map(Column::width).collect();
        let line = |cells: Vec<&str>| {
            let mut line = String::new();
            for ((cell, column), width) in cells.iter().zip(&self.0).zip(&widths) {
                let padding = " ".repeat(width - cell.chars().count());
                let parts = if column.right { [padding.as_str(), cell] } else { [cell, padding.as_str()] };
                line.extend(parts);
                line.push_str("  ");
            }
            line.trim_end().to_owned() + "\n"
        };
        let mut text = line(self.0.iter().map(|column| column.head.as_str()).collect());
        for row in 0..self.0.first().map_or(0, |column| column.cells.len()) {
            text.push_str(&line(self.0.iter().map(|column| column.cells[row].as_str()).collect()));
        }
        text
    }
}

/// The end of a name, which tells more than its beginning: `…gnome.Fractal`.
pub(super) fn ended(name: &str, most: usize) -> String {
    let count = name.chars().count();
    match count <= most {
        true => name.to_owned(),
        false => std::iter::once('…').chain(name.chars().skip(count + 1 - most)).collect(),
    }
}

/// The text in lines of at most `width`, all but the first indented; the first is as it begins.
pub(super) fn wrapped(text: &str, width: Option<usize>, indent: usize) -> String {
    let width = width.unwrap_or(usize::MAX);
    let begin = text.len() - text.trim_start_matches(' ').len();
    let (mut out, mut column) = (" ".repeat(begin), 0);
    for word in text.split_whitespace() {
        let length = word.chars().count();
        if column > 0 && column + 1 + length > width {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent));
            column = indent;
        } else if column > 0 {
            out.push(' ');
            column += 1;
        }
        if column == 0 {
            column = begin;
        }
        out.push_str(word);
        column += length;
    }
    out + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid() -> Grid {
        let column = |head: &str, worth, cell: &str| Column::new(head, worth, std::iter::once(cell.to_owned()));
        Grid::new(vec![
            column("APP", 9, "org.gnome.Fractal"),
            column("STATE", 1, "frozen"),
            column("NOW", 2, "1.0 MiB").right(),
        ])
    }

    #[test]
    fn what_matters_least_goes_first_then_the_beginning_of_names() {
        let text = |width| {
            let mut grid = grid();
            grid.fit(width);
            grid.text()
        };
        assert_eq!(text(80), "APP                STATE       NOW\norg.gnome.Fractal  frozen  1.0 MiB\n");
        assert_eq!(text(33), "APP               STATE       NOW\n…g.gnome.Fractal  frozen  1.0 MiB\n");
        assert_eq!(text(28), "APP                    NOW\norg.gnome.Fractal  1.0 MiB\n");
        assert_eq!(text(20), "APP              NOW\n…me.Fractal  1.0 MiB\n");
        assert!(text(1).contains("…Fractal"), "names are not cut to nothing");
    }

    #[test]
    fn text_is_broken_between_words() {
        assert_eq!(wrapped("one two three", Some(8), 2), "one two\n  three\n");
        assert_eq!(wrapped("one two", None, 2), "one two\n");
        assert_eq!(wrapped("  one two", Some(8), 4), "  one\n    two\n");
    }
}
