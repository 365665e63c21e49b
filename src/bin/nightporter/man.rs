//! The manual page, made from the command line so that neither can say what the other does not know.

use std::fmt::Write;

use clap::{Arg, Command, CommandFactory};
use clap_mangen::Man;

use crate::{
    args::{CONTRACT, Cli},
    exit::{Exit, Failure, MEANINGS},
};

/// `nightporter(1)` as troff.
pub(crate) fn page() -> Result<String, Failure> {
    let mut command = Cli::command();
    command.build();
    let man = Man::new(command.clone())
        .title("NIGHTPORTER")
        .section("1")
        .source(format!("nightporter {}", env!("CARGO_PKG_VERSION")))
        .manual("Night Porter");
    let mut head = Vec::new();
    man.render_title(&mut head)
        .and_then(|()| man.render_name_section(&mut head))
        .and_then(|()| man.render_synopsis_section(&mut head))
        .and_then(|()| man.render_options_section(&mut head))
        .map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
    let mut page = String::from_utf8(head).map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
    page.push_str(".SH APPS\n");
    page.push_str(&escape(
        "APP is the app's bus name, such as im.dino.Dino, or as much of its end as fits one app only, in any case: \
         dino, neochat, kde.neochat.",
    ));
    page.push_str("\n.SH COMMANDS\n");
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set() && sub.get_name() != "help") {
        subcommand(&mut page, sub);
    }
    page.push_str(".SH \"PROGRAMS TO BE MEASURED\"\n.nf\n");
    for line in CONTRACT.lines() {
        page.push_str(&escape(line));
        page.push('\n');
    }
    page.push_str(".fi\n.SH \"EXIT STATUS\"\n.TP\n\\fB0\\fR\nThe command did what was asked.\n");
    for (exit, meaning) in MEANINGS {
        let _ = writeln!(page, ".TP\n\\fB{}\\fR\n{}", exit as u8, escape(meaning));
    }
    page.push_str(concat!(
        ".SH ENVIRONMENT\n",
        ".TP\n\\fBDBUS_SESSION_BUS_ADDRESS\\fR, \\fBDBUS_SYSTEM_BUS_ADDRESS\\fR\nWhere the buses are.\n",
        ".TP\n\\fBNO_COLOR\\fR\nDraw no bars and use no colours.\n",
        ".TP\n\\fBTMPDIR\\fR\nWhere demo and measure keep their files while they run; /tmp and /var/tmp without it.\n",
        ".SH EXAMPLES\n.nf\n",
        "nightporter apps\n",
        "nightporter why dino\n",
        "nightporter push dino 'Hello'\n",
        "nightporter report \\-\\-json | jq .saved\n",
        "nightporter doctor\n",
        "nightporter doctor \\-\\-json | jq '.findings[] | select(.verdict == \"broken\")'\n",
        "nightporter demo \\-\\-apps 20 \\-\\-json figures.json\n",
        "nightporter measure experiment.toml \\-\\-json figures.json\n",
        ".fi\n",
        ".SH \"SEE ALSO\"\n\\fBnightporter.toml\\fR(5), \\fBnightporter\\-measure\\fR(5), \\fBnightporter\\-upstreams\\fR(7), ",
        "\\fBnightporter\\-relay\\fR(8), \\fBnightporterd\\fR(8)\n",
    ));
    Ok(page)
}

fn subcommand(page: &mut String, command: &Command) {
    let name = command.get_name();
    let arguments: Vec<&Arg> = command
        .get_arguments()
        .filter(|arg| !arg.is_hide_set() && !arg.is_global_set() && arg.get_id() != "help")
        .collect();
    let _ = write!(page, ".SS \"{}", escape(name));
    for arg in arguments.iter().filter(|arg| arg.is_positional()) {
        let _ = write!(page, " {}", value_name(arg));
    }
    page.push_str("\"\n");
    if let Some(about) = command.get_long_about().or_else(|| command.get_about()) {
        let _ = writeln!(page, "{}", escape(&about.to_string()));
    }
    for arg in arguments {
        page.push_str(".TP\n");
        match arg.get_long() {
            Some(long) => {
                let _ = write!(page, "\\fB\\-\\-{}\\fR", escape(long));
                if arg.get_action().takes_values() {
                    let _ = write!(page, " \\fI{}\\fR", value_name(arg));
                }
            }
            None => {
                let _ = write!(page, "\\fI{}\\fR", value_name(arg));
            }
        }
        page.push('\n');
        let mut help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        if let [default] = arg.get_default_values()
            && arg.get_action().takes_values()
        {
            let _ = write!(help, " (default: {})", default.to_string_lossy());
        }
        let _ = writeln!(page, "{}", escape(&help));
    }
}

fn value_name(arg: &Arg) -> String {
    match arg.get_value_names() {
        Some([name, ..]) => name.to_string(),
        _ => arg.get_id().as_str().to_ascii_uppercase(),
    }
}

/// Keeps troff from reading a text as requests.
fn escape(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    match text.starts_with(['.', '\'']) {
        true => format!("\\&{text}"),
        false => text,
    }
}
