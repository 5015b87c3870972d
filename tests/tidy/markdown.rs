//! Tables, fenced blocks, commands and anchors of a Markdown text.

use std::collections::BTreeSet;

/// The rows of the first table below a heading, without its head.
pub fn rows(text: &str, heading: &str) -> Vec<String> {
    let below = text.lines().skip_while(|line| {
        let own = line.trim_start_matches('#').trim();
        !line.starts_with('#') || !(own == heading || own.starts_with(&format!("{heading}:")))
    });
    let table = below.skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
    let rows: Vec<_> = table.skip(2).map(str::to_owned).collect();
    assert!(!rows.is_empty(), "no table below {heading}");
    rows
}

/// The fenced blocks in a language, each with the line that it begins at.
pub fn blocks(text: &str, language: &str) -> Vec<(usize, String)> {
    let mut blocks = Vec::new();
    let mut open: Option<(usize, String, bool)> = None;
    for (number, line) in (1..).zip(text.lines()) {
        // Within a list a block is indented.
        match (line.trim_start().strip_prefix("```"), &mut open) {
            (Some(own), None) => open = Some((number + 1, String::new(), own == language)),
            (Some(_), Some(_)) => {
                let closed = open.take().filter(|(_, _, is_wanted)| *is_wanted);
                blocks.extend(closed.map(|(line, text, _)| (line, text)));
            }
            (None, Some((_, text, _))) => {
                text.push_str(line);
                text.push('\n');
            }
            (None, None) => {}
        }
    }
    blocks
}

/// The commands of a shell's lines, each in words: what is between quotes is one, a pipe begins the next command.
pub fn commands(text: &str) -> Vec<Vec<String>> {
    let mut commands = Vec::new();
    for line in text.replace("\\\n", " ").lines().filter(|line| !line.trim_start().starts_with('#')) {
        let (mut words, mut word, mut quote): (Vec<String>, Option<String>, _) = (Vec::new(), None, None);
        for c in line.chars() {
            match (c, quote) {
                (c, Some(open)) if c == open => quote = None,
                ('\'' | '"', None) => {
                    quote = Some(c);
                    word.get_or_insert_default();
                }
                ('|', None) => {
                    words.extend(word.take());
                    commands.push(std::mem::take(&mut words));
                }
                (' ', None) => words.extend(word.take()),
                (c, _) => word.get_or_insert_default().push(c),
            }
        }
        words.extend(word);
        commands.push(words);
    }
    commands.retain(|words| !words.is_empty());
    commands
}

/// The headings of a page as GitHub makes anchors of them.
pub fn anchors(text: &str) -> BTreeSet<String> {
    let headings =
        text.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim());
    let slug = |heading: &str| {
        let kept = heading.to_lowercase();
        let kept = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(slug).collect()
}

#[test]
fn commands_and_anchors_are_read_as_shell_and_github_do() {
    let read = commands("a 'b c' \\\n  \"d\"|e\n# no\nf");
    assert_eq!(read, [vec!["a", "b c", "d"], vec!["e"], vec!["f"]]);
    assert!(anchors("## The header arrives, with `x`: a B").contains("the-header-arrives-with-x-a-b"));
}
