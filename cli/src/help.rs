//! The command line as a whole, and the page that `v4 --help` prints.

use std::fmt::Write as _;

use clap::Command;
use clap::builder::styling::{AnsiColor, Styles};

use crate::cmd;

const EXAMPLES: &str = "\
Examples:
  v4 run smollm2 \"Why is the sky blue?\"    one answer; pulls the model if it is not here
  v4 run smollm2                           chat; /bye leaves
  cat notes.txt | v4 run smollm2 \"Sum this up in one sentence.\"
  curl localhost:11434/api/tags            the HTTP API, as Ollama and OpenAI clients know it

Environment:
  V4_HOME      where models are kept (~/.v4)
  V4_HOST      use the daemon at http://HOST:PORT instead of this user's own
  V4_KEY       the key that it wants, made there with `v4 keys add`
  V4_SOCKET    where this user's daemon listens for these commands

The first command that needs it starts the daemon in the background.
`v4 COMMAND --help` says more about each.";

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::BrightBlue.on_default().bold())
    .usage(AnsiColor::BrightBlue.on_default().bold())
    .literal(AnsiColor::Green.on_default());

/// The command line.
pub fn command() -> Command {
    let cli = cmd::declare(
        Command::new("v4")
            .version(env!("CARGO_PKG_VERSION"))
            .about("Runs language models on this machine.")
            .styles(STYLES)
            .subcommand_required(true)
            .arg_required_else_help(true)
            .disable_help_subcommand(true),
    );
    let groups = groups(&cli);
    cli.help_template(format!(
        "{{about}}\n\n{{usage-heading}} v4 <COMMAND>\n{groups}\n{EXAMPLES}\n"
    ))
}

/// The visible commands by group, with the first line of each one's help.
fn groups(cli: &Command) -> String {
    let visible = || cmd::GROUPS.iter().filter(|(title, _)| !title.is_empty());
    let width = visible().flat_map(|(_, names)| *names).map(|name| name.len()).max().unwrap_or(0);
    let (title_style, name_style) = (STYLES.get_header(), STYLES.get_literal());
    let mut text = String::new();
    for (title, names) in visible() {
        let _ = writeln!(text, "\n{title_style}{title}:{title_style:#}");
        for name in *names {
            let about = cli.find_subcommand(name).and_then(Command::get_about);
            let about = about.map(ToString::to_string).unwrap_or_default();
            let _ = writeln!(text, "  {name_style}{name:<width$}{name_style:#}  {about}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn every_command_is_explained_and_the_hidden_ones_are_not() {
        let page = command().render_help().to_string();
        for command in command().get_subcommands() {
            let line = format!("\n  {} ", command.get_name());
            assert_eq!(page.contains(&line), !command.is_hide_set(), "{}", command.get_name());
            assert!(command.get_about().is_some(), "{}", command.get_name());
        }
        assert!(page.contains("Examples:"), "{page}");
    }
}
