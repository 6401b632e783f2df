// SPDX-License-Identifier: Apache-2.0
// The tests that execute a line: their number beside the line's count, their names when it is clicked.
"use strict";

function kvmpyNumbers(text) {
	const numbers = [];
	for (const part of text.split(" ").filter(Boolean)) {
		const [first, last] = part.split("-").map(Number);
		for (let number = first; number <= (last ?? first); number++)
			numbers.push(number);
	}
	return numbers;
}

document.addEventListener("DOMContentLoaded", () => {
	const panel = document.createElement("pre");
	panel.id = "kvmpy-tests";
	panel.style.cssText = "position:fixed;right:0;bottom:0;max-height:50vh;max-width:60vw;overflow:auto;margin:0;" +
		"padding:8px;background:Canvas;color:CanvasText;border:1px solid;z-index:99";
	panel.hidden = true;
	panel.addEventListener("click", () => { panel.hidden = true; });
	document.body.append(panel);
	for (const [line, set] of Object.entries(kvmpyLines)) {
		const cell = document.getElementById("L" + line)?.closest("tr")?.querySelector("td.linecount");
		if (!cell)
			continue;
		const tests = kvmpyNumbers(kvmpySets[set]);
		cell.title = `${tests.length} of ${kvmpyTests.length} tests; click for their names`;
		cell.style.cursor = "pointer";
		cell.addEventListener("click", () => {
			const names = tests.map(number => kvmpyTests[number]);
			panel.textContent = [`line ${line}, tests: ${names.length}`, ...names].join("\n");
			panel.hidden = false;
		});
	}
});
