// SPDX-License-Identifier: Apache-2.0
#include <kvmpy/printf.h>
#include <kvmpy/string.h>
#include <kvmpy/ucall.h>

struct spec {
	bool left, zero, plus, space, alt, upper;
	int width;
	int precision;		/* -1: none */
	char length;		/* 'l', 'h', 'H' for hh, or 0 */
};

struct sink {
	void (*put)(void *to, char c);
	void *to;
	int count;
};

static void emit(struct sink *sink, char c)
{
	sink->put(sink->to, c);
	sink->count++;
}

static void pad(struct sink *sink, char c, int n)
{
	while (n-- > 0)
		emit(sink, c);
}

static void emit_string(struct sink *sink, const struct spec *spec, const char *s)
{
	int len;

	if (!s)
		s = "(null)";
	len = strnlen(s, spec->precision < 0 ? INT32_MAX : spec->precision);
	if (!spec->left)
		pad(sink, ' ', spec->width - len);
	for (int i = 0; i < len; i++)
		emit(sink, s[i]);
	if (spec->left)
		pad(sink, ' ', spec->width - len);
}

static void emit_number(struct sink *sink, const struct spec *spec, u64 value, int base,
			const char *prefix)
{
	const char *digits = spec->upper ? "0123456789ABCDEF" : "0123456789abcdef";
	int plen = strlen(prefix);
	char buf[22];		/* of a u64 in octal */
	int len = 0;
	int zeros;

	for (; value; value /= base)
		buf[len++] = digits[value % base];
	if (!len && spec->precision)
		buf[len++] = '0';

	zeros = spec->precision - len;
	if (spec->precision < 0 && spec->zero && !spec->left)
		zeros = spec->width - plen - len;
	if (zeros < 0)
		zeros = 0;

	if (!spec->left)
		pad(sink, ' ', spec->width - plen - zeros - len);
	while (*prefix)
		emit(sink, *prefix++);
	pad(sink, '0', zeros);
	for (int i = len; i--;)
		emit(sink, buf[i]);
	if (spec->left)
		pad(sink, ' ', spec->width - plen - zeros - len);
}

static const char *parse_spec(struct spec *spec, const char *fmt, va_list *args)
{
	*spec = (struct spec){ .precision = -1 };

	for (;; fmt++) {
		if (*fmt == '-')
			spec->left = true;
		else if (*fmt == '0')
			spec->zero = true;
		else if (*fmt == '+')
			spec->plus = true;
		else if (*fmt == ' ')
			spec->space = true;
		else if (*fmt == '#')
			spec->alt = true;
		else
			break;
	}

	if (*fmt == '*') {
		spec->width = va_arg(*args, int);
		fmt++;
		if (spec->width < 0) {
			spec->left = true;
			spec->width = -spec->width;
		}
	}
	while (*fmt >= '0' && *fmt <= '9')
		spec->width = spec->width * 10 + *fmt++ - '0';

	if (*fmt == '.') {
		fmt++;
		spec->precision = 0;
		if (*fmt == '*') {
			spec->precision = va_arg(*args, int);
			fmt++;
		}
		while (*fmt >= '0' && *fmt <= '9')
			spec->precision = spec->precision * 10 + *fmt++ - '0';
	}

	/* long, long long, size_t and ptrdiff_t are all 64 bits wide. */
	for (; *fmt == 'l' || *fmt == 'z' || *fmt == 't' || *fmt == 'j'; fmt++)
		spec->length = 'l';
	for (; *fmt == 'h'; fmt++)
		spec->length = spec->length == 'h' ? 'H' : 'h';
	return fmt;
}

static s64 signed_arg(const struct spec *spec, va_list *args)
{
	if (spec->length == 'l')
		return va_arg(*args, s64);
	if (spec->length == 'h')
		return (s16)va_arg(*args, int);
	if (spec->length == 'H')
		return (s8)va_arg(*args, int);
	return va_arg(*args, int);
}

static u64 unsigned_arg(const struct spec *spec, va_list *args)
{
	if (spec->length == 'l')
		return va_arg(*args, u64);
	if (spec->length == 'h')
		return (u16)va_arg(*args, int);
	if (spec->length == 'H')
		return (u8)va_arg(*args, int);
	return va_arg(*args, u32);
}

static void emit_signed(struct sink *sink, const struct spec *spec, s64 value)
{
	const char *sign = spec->plus ? "+" : spec->space ? " " : "";
	u64 magnitude = value;

	if (value < 0) {
		sign = "-";
		magnitude = -magnitude;
	}
	emit_number(sink, spec, magnitude, 10, sign);
}

static void emit_hex(struct sink *sink, const struct spec *spec, u64 value)
{
	const char *prefix = "";

	if (spec->alt && value)
		prefix = spec->upper ? "0X" : "0x";
	emit_number(sink, spec, value, 16, prefix);
}

/* One conversion; returns what follows it. */
static const char *convert(struct sink *sink, const char *fmt, va_list *args)
{
	struct spec spec;
	char one[2] = "";

	fmt = parse_spec(&spec, fmt, args);
	switch (*fmt) {
	case 'd':
	case 'i':
		emit_signed(sink, &spec, signed_arg(&spec, args));
		break;
	case 'u':
		emit_number(sink, &spec, unsigned_arg(&spec, args), 10, "");
		break;
	case 'o':
		emit_number(sink, &spec, unsigned_arg(&spec, args), 8, spec.alt ? "0" : "");
		break;
	case 'X':
		spec.upper = true;
		/* fall through */
	case 'x':
		emit_hex(sink, &spec, unsigned_arg(&spec, args));
		break;
	case 'p':
		emit_number(sink, &spec, (u64)va_arg(*args, void *), 16, "0x");
		break;
	case 's':
		emit_string(sink, &spec, va_arg(*args, const char *));
		break;
	case 'c':
		one[0] = va_arg(*args, int);
		spec.precision = -1;
		emit_string(sink, &spec, one);
		break;
	case '%':
		emit(sink, '%');
		break;
	case '\0':
		return fmt;
	default:
		/* Show what was not understood. */
		emit(sink, '%');
		emit(sink, *fmt);
	}
	return fmt + 1;
}

int guest_format(void (*put)(void *to, char c), void *to, const char *fmt, va_list args)
{
	struct sink sink = { .put = put, .to = to };
	va_list ap;

	va_copy(ap, args);
	while (*fmt) {
		if (*fmt == '%')
			fmt = convert(&sink, fmt + 1, &ap);
		else
			emit(&sink, *fmt++);
	}
	va_end(ap);
	return sink.count;
}

struct buffer {
	char *at;
	char *end;
};

static void put_buffer(void *to, char c)
{
	struct buffer *b = to;

	if (b->at < b->end)
		*b->at++ = c;
}

int vsnprintf(char *buf, size_t size, const char *fmt, va_list args)
{
	struct buffer b = { .at = buf, .end = buf + (size ? size - 1 : 0) };
	int len = guest_format(put_buffer, &b, fmt, args);

	if (size)
		*b.at = '\0';
	return len;
}

int snprintf(char *buf, size_t size, const char *fmt, ...)
{
	va_list args;
	int len;

	va_start(args, fmt);
	len = vsnprintf(buf, size, fmt, args);
	va_end(args);
	return len;
}

struct line {
	struct guest_ucall_slot *slot;
	u32 len;
};

static void send_line(struct line *line)
{
	line->slot->text[line->len] = '\0';
	line->slot->cmd = KVMPY_UCALL_CMD_PRINTF | KVMPY_UCALL_HAS_TEXT;
	guest_ucall_send(line->slot);
	line->len = 0;
}

static void put_line(void *to, char c)
{
	struct line *line = to;

	if (line->len == sizeof(line->slot->text) - 1)
		send_line(line);
	line->slot->text[line->len++] = c;
}

void guest_printf(const char *fmt, ...)
{
	struct line line = { .slot = guest_ucall_current() };
	va_list args;

	va_start(args, fmt);
	guest_format(put_line, &line, fmt, args);
	va_end(args);
	send_line(&line);
}
