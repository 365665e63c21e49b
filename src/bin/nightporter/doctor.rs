//! `nightporter doctor`: has the machine looked at, and shows what was found.

use std::{fmt::Write, io, process::ExitCode};

use nightporter::{
    daemon::{DaemonError, Options},
    doctor::{self, facts::Config},
    sys::doctor::{Question, look},
    view::{Doctor, Finding, Verdict},
};

use crate::{
    args::{BusChoice, Output},
    exit::Exit,
    render::{Style, clean},
};

/// Text is not made narrower than this, nor wider than that.
const NARROWEST: usize = 40;
const WIDEST: usize = 100;
/// Where the text of a finding begins.
const INDENT: usize = 10;

/// What to print and how to end.
pub(crate) fn run(choice: BusChoice, output: Output, style: Style) -> (String, ExitCode) {
    let options = Options { user: choice.user, ..Options::default() };
    let question = Question {
        user: choice.user,
        state_dir: options.state_dir().map_err(|error| error.to_string()),
        config: Box::new(move || configuration(&options)),
    };
    let found = doctor::examine(&look(question));
    let end = if found.counts.broken > 0 { Exit::Refused.into() } else { ExitCode::SUCCESS };
    let text = if output.json {
        serde_json::to_string(&found).map_or_else(|error| format!("{error}\n"), |text| text + "\n")
    } else {
        render(&found, style)
    };
    (text, end)
}

fn configuration(options: &Options) -> Config {
    match options.settings() {
        Ok((_, None)) => Config::Defaults,
        Ok((settings, Some(path))) => Config::Valid(path.display().to_string(), Box::new(settings)),
        Err(DaemonError::ConfigUnreadable(path, error)) if error.kind() == io::ErrorKind::PermissionDenied => {
            Config::Denied(path.display().to_string())
        }
        Err(DaemonError::ConfigUnreadable(path, error)) => {
            Config::Unreadable(path.display().to_string(), error.to_string())
        }
        Err(DaemonError::Config(path, error)) => Config::Invalid(path.display().to_string(), error.to_string()),
        Err(error) => Config::Unreadable("nightporter.toml".to_owned(), error.to_string()),
    }
}

fn render(found: &Doctor, style: Style) -> String {
    let width = style.width.map(|width| width.clamp(NARROWEST, WIDEST));
    let mut text = format!("Night Porter {}", clean(&found.version));
    if found.scope == "user" {
        text.push_str(", for this session (--user)");
    }
    let _ = writeln!(text, "\n{}", clean(&found.machine));
    let mut area = "";
    for finding in &found.findings {
        if finding.area != area {
            area = &finding.area;
            let _ = writeln!(text, "\n{}", paint(&area.to_uppercase(), "1", style));
        }
        one(&mut text, finding, style, width);
    }
    let counts = &found.counts;
    let sum = format!("{} ok, {} to note, {} lacking, {} broken", counts.ok, counts.note, counts.lacks, counts.broken);
    let _ = writeln!(text, "\n{}", paint(&sum, if counts.broken > 0 { "31" } else { "32" }, style));
    text
}

fn one(text: &mut String, finding: &Finding, style: Style, width: Option<usize>) {
    let (word, colour) = match finding.verdict {
        Verdict::Ok => ("ok", "32"),
        Verdict::Note => ("note", "36"),
        Verdict::Lacks => ("lacks", "33"),
        Verdict::Broken => ("broken", "31"),
    };
    let padding = " ".repeat(INDENT - 2 - word.len());
    let said = format!("{}: {}", finding.id, finding.text);
    let mut lines = wrap(&said, width, INDENT).into_iter();
    let _ = writeln!(text, "  {}{padding}{}", paint(word, colour, style), lines.next().unwrap_or_default());
    for line in lines {
        let _ = writeln!(text, "{:INDENT$}{line}", "");
    }
    if let Some(instead) = &finding.instead {
        labelled(text, "so: ", wrap(instead, width, INDENT + 4));
    }
    // Commands are there to be copied: each stays in one line.
    labelled(text, "do: ", finding.mend.iter().map(|line| clean(line)).collect());
}

fn labelled(text: &mut String, label: &str, lines: Vec<String>) {
    for (index, line) in lines.into_iter().enumerate() {
        let _ = writeln!(text, "{:INDENT$}{}{line}", "", if index == 0 { label } else { "    " });
    }
}

/// Lines of at most `width` columns less `indent`. A text of several lines keeps them: the middle of a file is shown.
fn wrap(text: &str, width: Option<usize>, indent: usize) -> Vec<String> {
    let text = text.trim_end();
    let room = match width {
        Some(width) if !text.contains('\n') => width.saturating_sub(indent).max(1),
        _ => return text.lines().map(clean).collect(),
    };
    let mut lines = vec![String::new()];
    for word in clean(text).split(' ').filter(|word| !word.is_empty()) {
        let Some(line) = lines.last_mut() else { break };
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count() + 1 + word.chars().count() <= room {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

fn paint(text: &str, colour: &str, style: Style) -> String {
    if style.bars { format!("\u{1b}[{colour}m{text}\u{1b}[0m") } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use nightporter::view::DoctorCounts;

    use super::*;

    fn found() -> Doctor {
        Doctor {
            version: "1".into(),
            scope: "system".into(),
            machine: "Debian on a board".into(),
            counts: DoctorCounts { lacks: 1, ..DoctorCounts::default() },
            findings: vec![Finding {
                area: "memory".into(),
                id: "swap".into(),
                verdict: Verdict::Lacks,
                text: "there is no swap, or so it \u{1b}[2J seems".into(),
                instead: Some("nothing can be paged out".into()),
                mend: vec!["sudo a-very-long-command --with many --words".into(), "sudo reboot".into()],
            }],
        }
    }

    #[test]
    fn plain_text_has_no_colours_and_is_not_cut() {
        let style = Style { bars: false, width: None };
        assert_eq!(
            render(&found(), style),
            "Night Porter 1\nDebian on a board\n\nMEMORY\n  \
             lacks   swap: there is no swap, or so it \u{fffd}[2J seems\n          \
             so: nothing can be paged out\n          \
             do: sudo a-very-long-command --with many --words\n              sudo reboot\n\n\
             0 ok, 0 to note, 1 lacking, 0 broken\n"
        );
    }

    #[test]
    fn a_narrow_terminal_gets_short_lines_and_whole_commands() {
        let text = render(&found(), Style { bars: true, width: Some(20) });
        assert!(text.contains("\u{1b}[33mlacks\u{1b}[0m   swap: there is no swap, or so\n          it"), "{text:?}");
        assert!(text.contains("do: sudo a-very-long-command --with many --words\n"), "{text:?}");
    }

    #[test]
    fn a_text_of_several_lines_keeps_them() {
        assert_eq!(wrap("a b\n  | c\n", Some(3), 0), ["a b", "  | c"]);
        assert_eq!(wrap("", Some(30), 0), [""]);
        assert_eq!(wrap("aaa bb c", Some(4), 0), ["aaa", "bb c"]);
    }
}
